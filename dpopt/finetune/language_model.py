# SPDX-License-Identifier: Apache-2.0
"""A causal language model and its tokenizer: loaded, fitted with an adapter, fed with padded batches, saved.

The law of this file: what a record looks like to the model depends on that record alone. Padding is masked and
carries no label; a record is cut at a fixed number of tokens.

Shapes: B records, T tokens of the longest of them.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dpopt.atomic_files import whole_folder
from dpopt.finetune.record_files import InputError, TextRecord
from dpopt.losses import IGNORED


class Tokens(NamedTuple):
    """One record as token ids, of which the first `num_prompt` carry no loss."""

    ids: Tensor
    num_prompt: int


class TokenBatch(NamedTuple):
    """Input ids, attention mask and labels, each (B, T); labels are -100 on padding and on prompts."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what transformers and peft say while loading and saving; errors still come as exceptions."""
    verbosity = transformers_logging.get_verbosity()
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


def load(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a causal model in float32, and its tokenizer, from a folder or from the Hugging Face Hub.

    Raises:
        InputError: there is no such model, or it cannot be loaded as a causal language model.
    """
    path = Path(name).expanduser()
    if path.exists() and not (path / "config.json").is_file():
        raise InputError(
            f"expected a folder with a config.json at {name}; got none; pass a folder that save_pretrained wrote"
        )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with quiet():
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
            told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"expected a causal language model called {name!r}{offline}; got: {told}; pass a local folder or the "
                "name of a model on the Hugging Face Hub, or leave --model out for the embedded one"
            ) from error
    _refuse_foreign(cast("PreTrainedTokenizerBase", tokenizer), cast("nn.Module", model), name)
    return cast("nn.Module", model), cast("PreTrainedTokenizerBase", tokenizer)


def _refuse_foreign(tokenizer: PreTrainedTokenizerBase, model: nn.Module, name: str) -> None:
    rows = cast("Any", model).get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InputError(
            f"expected a tokenizer of at most {rows} tokens, as many as {name!r} embeds; got {len(tokenizer)}; use "
            "the tokenizer that the model was made with"
        )


def with_adapter(model: nn.Module, rank: int) -> nn.Module:
    """Fit LoRA adapters of the given rank to every linear layer but the head (peft's "all-linear")."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with quiet():
        return cast("nn.Module", get_peft_model(cast("Any", model), config))


def longest(model: nn.Module) -> int | None:
    """The most positions that the model takes, where its configuration says so."""
    config = getattr(model, "config", None)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def encode(
    records: Sequence[TextRecord], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> list[Tokens]:
    """Each record as at most `max_tokens` tokens, prompt first, an end-of-sequence token after the text."""
    if not records:
        return []
    run = cast("Callable[..., dict[str, list[list[int]]]]", tokenizer)
    end = tokenizer.eos_token_id
    whole = not any(record.prompt for record in records)
    texts = run([r.text for r in records], verbose=False, add_special_tokens=whole)["input_ids"]
    prompts = [[]] * len(records) if whole else run([r.prompt for r in records], verbose=False)["input_ids"]
    encoded = []
    for prompt, text in zip(prompts, texts, strict=True):
        head = prompt[:-1] if prompt and prompt[-1] == end else prompt
        tail = [] if end is None or (text and text[-1] == end) else [end]
        encoded.append(Tokens(torch.tensor([*head, *text, *tail][:max_tokens], device="cpu"), len(head)))
    return encoded


def collate(batch: Sequence[Tokens], *, pad: int, device: torch.device) -> TokenBatch:
    """Pad a batch on the right to its longest record."""
    ids = [record.ids for record in batch]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
    labels = padded.masked_fill(mask == 0, IGNORED)
    for row, record in enumerate(batch):
        labels[row, : record.num_prompt] = IGNORED
    return TokenBatch(padded.to(device), mask.to(device), labels.to(device))


def logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    """The model's logits (B, T, V) for a batch."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to pad with; it is masked, so any will do."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(found, int):
            return found
    return 0


def save(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model or its adapter, and the tokenizer, to `folder`: all of them or nothing.

    Raises:
        OSError: it could not be written (a full disk, say); `folder` is as it was.
    """
    # peft would ask the Hub whether the vocabulary was resized
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    with quiet(), whole_folder(folder) as partial:
        cast("Any", model).save_pretrained(str(partial), **options)
        tokenizer.save_pretrained(str(partial))


def device_called(name: str) -> torch.device:
    """The device of this name; "auto" is a GPU where there is one.

    Raises:
        InputError: torch has no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"expected a device that torch has here; got {name!r}; pass cpu, cuda or auto"
        ) from error
