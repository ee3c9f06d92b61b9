# SPDX-License-Identifier: Apache-2.0
"""How a shadow language model is trained: as the model under attack was, on the records that it is given.

Shapes: n records.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from clipping import FlatClipper
from dpopt.finetune.language_model import Tokens, collate, load, logits
from dpopt.finetune.record_files import InputError
from dpopt.losses import causal_lm_losses
from dpopt.mechanisms import GaussianMechanism
from dpopt.sampling import Batch, poisson
from dpopt.training import PrivateTraining


@dataclass(frozen=True, slots=True)
class Recipe:
    """The numbers of a fine-tuning run.

    Args:
        base: folder or name of the model that training starts from.
        steps: optimizer steps.
        batch_size: expected records of a step, drawn independently.
        learning_rate: of the optimizer.
        clip_norm: of each record's gradient; None: not clipped.
        noise_multiplier: noise over clip norm; 0: none.
        physical_batch_size: records at a time.
        max_tokens: of a record.
        optimizer: "adamw", whose rate falls linearly to 0, or "sgd", without momentum and at a constant rate.
    """

    base: str
    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    clip_norm: float | None = None
    noise_multiplier: float = 0.0
    physical_batch_size: int = 32
    max_tokens: int = 128
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        if self.noise_multiplier and self.clip_norm is None:
            raise InputError(
                f"expected a clip norm beside noise; got noise multiplier {self.noise_multiplier:g} alone; give both"
            )
        if self.optimizer not in {"adamw", "sgd"}:
            raise InputError(f"expected the optimizer adamw or sgd; got {self.optimizer!r}; take one of them")


def train_language_model(
    recipe: Recipe, records: Sequence[Tokens], seed: int, *, model: nn.Module | None = None
) -> nn.Module:
    """Fine-tune the base model on `records`.

    With a clip norm it runs a private step; its charges go to a ledger that is thrown away: the result is an
    instrument of an audit, not a private release.

    Args:
        recipe: how.
        records: on what.
        seed: decides batches and noise; a run with the same seed repeats, and is not private.
        model: start from this model, which is changed; default: the recipe's base.

    Returns:
        The model, in evaluation mode.
    """
    torch.manual_seed(seed)
    model = load(recipe.base)[0] if model is None else model
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = _optimizer(recipe, trainable)
    sampling = poisson(num_records=len(records), batch_size=min(recipe.batch_size, len(records)))
    if recipe.clip_norm is None:
        random = torch.Generator().manual_seed(seed)
        for _ in range(recipe.steps):
            drawn = [records[i] for i in sampling.draw(len(records), random)]
            for part in _parts(drawn, recipe.physical_batch_size):
                (_losses(model, part).sum() / sampling.expected_batch_size).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return model.eval()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        with PrivateTraining(
            model,
            clipper=FlatClipper(recipe.clip_norm),
            mechanism=GaussianMechanism(recipe.noise_multiplier),
            sampling=sampling,
            ledger=Path(folder) / "ledger.jsonl",
            insecure_seed=seed,
        ) as private:
            for batch in private.batches(records, steps=recipe.steps):
                for part in _parts_of(batch, recipe.physical_batch_size):
                    private.accumulate(_losses(model, part))
                private.release()
                optimizer.step()
                schedule.step()
    return model.eval()


def _optimizer(recipe: Recipe, trainable: list[nn.Parameter]) -> tuple[Optimizer, LambdaLR]:
    if recipe.optimizer == "sgd":
        optimizer: Optimizer = SGD(trainable, lr=recipe.learning_rate)
        return optimizer, LambdaLR(optimizer, lambda step: 1.0)
    optimizer = AdamW(trainable, lr=recipe.learning_rate, weight_decay=0.0)
    return optimizer, LambdaLR(optimizer, lambda step: max(1 - step / recipe.steps, 0.0))


def steps_of(num_records: int, batch_size: int, epochs: float) -> int:
    """Steps of about so many passes over the records."""
    return max(math.ceil(epochs * num_records / batch_size), 1)


def _parts_of(batch: Batch, size: int) -> list[list[Tokens]]:
    return _parts([example for example in batch.examples if isinstance(example, Tokens)], size)


def _parts(records: Sequence[Tokens], size: int) -> list[list[Tokens]]:
    """Physical batches of similar lengths: none holds a record of more than twice the tokens of its shortest."""
    parts: list[list[Tokens]] = []
    for record in sorted(records, key=lambda record: len(record.ids)):
        if not parts or len(parts[-1]) == size or len(record.ids) > 2 * len(parts[-1][0].ids):
            parts.append([])
        parts[-1].append(record)
    return parts


def _losses(model: nn.Module, part: Sequence[Tokens]) -> torch.Tensor:
    batch = collate(part, pad=0, device=next(model.parameters()).device)
    return causal_lm_losses(logits(model, batch), batch.labels)
