# SPDX-License-Identifier: Apache-2.0
"""A language model fine-tuned on private docstrings: the explicit door, where every part of a step is visible.

    python examples/04_private_training.py

Draw a batch, send back one loss for each example, release, step. Nothing is charged before `release`; the
charge is on disk before the noise exists; the optimizer sees noisy gradients only. The unit of privacy is one
docstring, cut to a fixed number of tokens.
"""

import argparse

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpopt import (
    Budget,
    FlatClipper,
    GaussianMechanism,
    PrivateTraining,
    causal_lm_losses,
    noise_multiplier,
    poisson,
)
from dpopt.embedded import model_path, private_records

PAD, IGNORED = 0, -100


def tokenized(tokenizer, texts: tuple[str, ...], length: int) -> list[Tensor]:
    """Token numbers of each text, `length` of them, padded at the end."""
    rows = [tokenizer(text, truncation=True, max_length=length).input_ids for text in texts]
    return [torch.tensor(row + [PAD] * (length - len(row))) for row in rows]


def losses_of(model: nn.Module, rows: list) -> Tensor:
    """(B,): mean loss of each example over its *own* tokens; a mean over the batch's would mix them."""
    tokens = torch.stack(rows)
    logits = model(input_ids=tokens, attention_mask=(tokens != PAD).long()).logits
    return causal_lm_losses(logits, tokens.masked_fill(tokens == PAD, IGNORED))


@torch.no_grad()
def validation_loss(model: nn.Module, rows: list[Tensor]) -> float:
    """Mean loss of held-out examples."""
    model.eval()
    found = [losses_of(model, rows[i : i + 32]) for i in range(0, len(rows), 32)]
    model.train()
    return float(torch.cat(found).mean())


def main() -> None:
    """Fine-tune privately; print validation loss and epsilon on the way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1000, help="private docstrings at most")
    parser.add_argument("--validation", type=int, default=64, help="held-out docstrings at most")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    model.train()
    records = private_records(max_train=args.records, max_validation=args.validation, packages=("networkx",))
    train = tokenized(tokenizer, records.train, args.tokens)
    held_out = tokenized(tokenizer, records.validation, args.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    # The number of records and the batch size are public constants: they are part of the statement.
    sampling = poisson(num_records=len(train), batch_size=args.batch_size)
    noise = noise_multiplier(
        epsilon=args.epsilon, delta=args.delta, sampling_rate=sampling.sampling_rate, steps=args.steps
    )
    print(
        f"{len(train)} docstrings, sampling rate {sampling.sampling_rate:.4f}, noise multiplier {noise:.3f}"
    )
    print(f"step 0: validation loss {validation_loss(model, held_out):.3f}")
    with PrivateTraining(
        model,
        clipper=FlatClipper(1.0),
        mechanism=GaussianMechanism(noise),
        sampling=sampling,
        budget=Budget(args.epsilon, args.delta),
        unit="one docstring",
    ) as private:
        for batch in private.batches(train, steps=args.steps):
            for part in batch.split(args.micro_batch):
                private.accumulate(losses_of(model, part))
            private.release()
            optimizer.step()
            if private.steps % 5 == 0 or private.steps == args.steps:
                loss, epsilon = validation_loss(model, held_out), private.epsilon(args.delta)
                print(
                    f"step {private.steps}: validation loss {loss:.3f}, epsilon {epsilon:.2f} at {args.delta}"
                )


if __name__ == "__main__":
    main()
