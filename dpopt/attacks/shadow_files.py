# SPDX-License-Identifier: Apache-2.0
"""Shadow language models on a pool of records that stands in files.

The law of this file: what a folder of shadow models holds follows from files and options alone; others are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpopt.attacks.files import load_attacked, tokens_of
from dpopt.attacks.shadow import ShadowPlan, record_digest, train_shadows
from dpopt.attacks.shadow_training import Recipe, steps_of, train_language_model
from dpopt.finetune.language_model import save
from dpopt.finetune.record_files import InputError, RecordFormat, read_records


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowFiles:
    """What shadow models are made of.

    Args:
        model: what the attacked model was trained from.
        pool: files of members and non-members.
        out: the folder of the models.
        num_models: even.
        form: which fields of a row count.
        max_tokens: of a record.
        epochs: passes over the half that a model gets.
        batch_size: expected records of a step.
        learning_rate: falling linearly to 0.
        clip_norm: None: gradients are not clipped.
        noise_multiplier: noise over clip norm.
        seed: of coins and training.
        device: where the models are trained.
    """

    model: str
    pool: Sequence[Path]
    out: Path
    num_models: int = 8
    form: RecordFormat | None = None
    max_tokens: int | None = None
    epochs: float = 3.0
    batch_size: int = 64
    learning_rate: float = 1e-3
    clip_norm: float | None = None
    noise_multiplier: float = 0.0
    seed: int = 0
    device: torch.device | str = "cpu"


def train_shadow_files(files: ShadowFiles, trained: Callable[[int], object]) -> None:
    """Train the shadow models that the folder does not hold yet.

    Args:
        files: what.
        trained: told the number of each model that is there.

    Raises:
        InputError: something cannot be used, or the folder was begun otherwise.
    """
    if files.batch_size < 1 or files.epochs <= 0:
        raise InputError(
            f"expected a batch and some passes; got {files.batch_size} records and {files.epochs:g}; take 64 and 3"
        )
    records = read_records(files.pool, files.form)
    model, tokenizer = load_attacked(files.model)
    tokens = tokens_of(records, model, tokenizer, files.max_tokens)
    half = max(len(records) // 2, 1)
    recipe = Recipe(
        base=files.model,
        steps=steps_of(half, files.batch_size, files.epochs),
        batch_size=files.batch_size,
        learning_rate=files.learning_rate,
        clip_norm=files.clip_norm,
        noise_multiplier=files.noise_multiplier,
        max_tokens=max(len(one.ids) for one in tokens),
    )
    plan = ShadowPlan(tuple(record_digest(record) for record in records), files.seed, asdict(recipe))

    def train(places: NDArray[np.int64], seed: int) -> nn.Module:
        base = load_attacked(files.model)[0].to(files.device)
        return train_language_model(recipe, [tokens[i] for i in places], seed, model=base)

    train_shadows(
        files.out,
        plan,
        files.num_models,
        train,
        lambda one, folder: save(one, tokenizer, folder),
        trained=trained,
    )
