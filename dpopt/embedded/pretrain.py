# SPDX-License-Identifier: Apache-2.0
"""Make the embedded model from nothing: `python -m dpopt.embedded.pretrain`, about half an hour on one core.

The tokenizer and the weights see the public text only. Private records are measured, never trained on, and the
measurement decides nothing. Shapes: B windows of T tokens, V tokens in the vocabulary.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpopt.embedded import MODEL_PATH
from dpopt.embedded.docstrings import Fingerprints
from dpopt.embedded.public import FINGERPRINTS_FILE, Document, public_documents
from dpopt.embedded.records import private_records

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
RECORD_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Recipe:
    """One phase of training: `steps` steps of a cosine over `horizon` steps, `tokens_per_step` tokens each."""

    vocab_size: int = 2048
    steps: int = 3200
    horizon: int = 4400
    tokens_per_step: int = 4096
    window: int = 128
    first_prose_share: float = 0.3
    last_prose_share: float = 0.85
    learning_rate: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Return the share of the highest learning rate at a step: linear warm-up, then a cosine to 0."""
        progress = (step - self.warmup) / (self.horizon - self.warmup)
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * max(0.0, progress)))

    def prose_share(self, step: int) -> float:
        """Return the share of windows from prose rather than from source code; grows linearly."""
        return self.first_prose_share + (self.last_prose_share - self.first_prose_share) * step / self.horizon


PHASES = (
    Recipe(),
    Recipe(steps=240, horizon=240, window=256, first_prose_share=0.85, learning_rate=8e-4, warmup=10, seed=1),
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; it puts `<|bos|>` before a text and leaves `<|eos|>` to its user."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, BOS, EOS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=256,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Make a Llama of about one million parameters with tied embeddings and no dropout."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.get_vocab()[PAD],
        bos_token_id=tokenizer.get_vocab()[BOS],
        eos_token_id=tokenizer.get_vocab()[EOS],
    )
    return LlamaForCausalLM(config)


def stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the token ids of the texts, one after the other, each between bos and eos."""
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return torch.tensor([token for ids in encoded for token in (*ids, end)], device="cpu")


def record_batch(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Return input ids and targets, both (B, T), of records cut at `RECORD_TOKENS`; targets are -100 on padding."""
    ids = [
        torch.tensor([*row, tokenizer.eos_token_id][:RECORD_TOKENS], device="cpu")
        for row in tokenizer(list(texts), verbose=False)["input_ids"]
    ]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    return padded[:, :-1].clamp(min=0), padded[:, 1:]


@torch.no_grad()
def record_loss(model: LlamaForCausalLM, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> float:
    """Return the mean loss per token, in nats, over the first `RECORD_TOKENS` tokens of each text."""
    total, count = 0.0, 0
    for start in range(0, len(texts), 64):
        inputs, targets = record_batch(texts[start : start + 64], tokenizer)
        logits = model(input_ids=inputs, use_cache=False).logits
        total += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += int((targets >= 0).sum())
    return total / count


def windows(tokens: Tensor, generator: torch.Generator) -> Callable[[int, int], Tensor]:
    """Return a source of (number, length) windows of a stream: all of it, from a random shift, in random order."""
    order: list[int] = []
    length_now = 0

    def take(number: int, length: int) -> Tensor:
        nonlocal order, length_now
        if len(order) < number or length != length_now:
            shift = int(torch.randint(length, (), generator=generator, device="cpu"))
            starts = torch.arange(shift, len(tokens) - length, length, device="cpu")
            order, length_now = (
                starts[torch.randperm(len(starts), generator=generator, device="cpu")].tolist(),
                length,
            )
        taken, order = order[:number], order[number:]
        return (
            torch.stack([tokens[start : start + length] for start in taken])
            if taken
            else tokens.new_empty(0, length)
        )

    return take


def batches(prose: Tensor, source: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Yield one batch of token ids (B, T + 1) for each step."""
    generator = torch.Generator().manual_seed(recipe.seed)
    take_prose, take_source = windows(prose, generator), windows(source, generator)
    for step in range(recipe.steps):
        length = recipe.window
        number = recipe.tokens_per_step // length
        from_prose = round(recipe.prose_share(step) * number)
        yield torch.cat([take_prose(from_prose, length + 1), take_source(number - from_prose, length + 1)])


def train(
    model: LlamaForCausalLM, batch_of: Iterable[Tensor], recipe: Recipe, report: Callable[[int, float], None]
) -> None:
    """Train the model in place with AdamW; matrix products in bfloat16, weights in float32."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    scales = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    for step, tokens in enumerate(batch_of, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == recipe.steps:
            report(step, loss.item())


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, provenance: object
) -> None:
    """Write the model, the tokenizer and where they come from, in the format of Hugging Face."""
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    (folder / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n")


def describe(documents: Sequence[Document], tokens: dict[str, int]) -> dict[str, object]:
    """Say where the model comes from, without a name of a machine or of a person."""
    kinds = sorted({document.kind for document in documents})
    return {
        "text": "Python standard library: docstrings, help() topics, comments, source code; no other text",
        "text_license": "PSF-2.0",
        "made_by": "python -m dpopt.embedded.pretrain",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "documents": {kind: sum(document.kind == kind for document in documents) for kind in kinds},
        "documents_held_out": sum(document.held_out for document in documents),
        "tokens_of_text": tokens,
    }


def pretrain(folder: Path, phases: Sequence[Recipe], *, resume: bool) -> None:
    """Make tokenizer, weights and provenance from the standard library; or go on from those in the folder."""
    documents = list(public_documents())
    seen = Fingerprints()
    for document in documents:
        seen.add(document.text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINGERPRINTS_FILE).write_bytes(seen.to_bytes())
    kept = [document for document in documents if not document.held_out]
    prose_texts = [document.text for document in kept if document.kind != "source"]
    tokenizer = train_tokenizer(prose_texts, vocab_size=PHASES[0].vocab_size)
    prose = stream(prose_texts, tokenizer)
    source = stream([document.text for document in kept if document.kind == "source"], tokenizer)
    provenance = describe(documents, {"prose": len(prose), "source": len(source)})
    measured = {
        "public_held_out_docstrings": [d.text for d in documents if d.held_out and d.kind == "docstring"],
        "private_validation_records": private_records(fingerprints=seen).validation,
    }
    model = LlamaForCausalLM.from_pretrained(folder) if resume else new_model(tokenizer, phases[0])
    done = json.loads((folder / "PROVENANCE.json").read_text())["phases"] if resume else []
    for recipe in phases:
        started = time.monotonic()
        train(model, batches(prose, source, recipe), recipe, report)
        losses = {name: round(record_loss(model, texts, tokenizer), 4) for name, texts in measured.items()}
        done.append(
            {"recipe": asdict(recipe), "losses": losses, "seconds": round(time.monotonic() - started)}
        )
        print(losses, flush=True)
        save(model, tokenizer, folder, provenance | {"phases": done})


def report(step: int, loss: float) -> None:
    """Print the loss of one step."""
    print(f"step {step} loss {loss:.3f}", flush=True)


def main() -> None:
    """Read the command line and pretrain."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--folder", type=Path, default=MODEL_PATH, help="where the model is written")
    parser.add_argument(
        "--resume", type=int, default=0, help="phases that the model in the folder has behind it"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrain(arguments.folder, PHASES[arguments.resume :], resume=arguments.resume > 0)


if __name__ == "__main__":
    main()
