# SPDX-License-Identifier: Apache-2.0
"""Digits with flipped training labels and a small network."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.estimators.problem import Problem

FLIPPED, HIDDEN, CLASSES = 0.2, 64, 10


@lru_cache(maxsize=2)
def _all(path: Path) -> tuple[Tensor, Tensor]:
    held = np.load(path)
    x = np.concatenate([held[k] for k in sorted(held.files) if k.startswith("x")])
    y = np.concatenate([held[k] for k in sorted(held.files) if k.startswith("y")])
    pixels = torch.from_numpy(x.reshape(len(x), -1)).float()
    return pixels / pixels.max(), torch.from_numpy(y.astype(np.int64))


def drawn(data: str, name: str, num_records: int, seed: int) -> Problem:
    """`num_records` rows to train on, labels flipped, the others to test."""
    x, y = _all(Path(data) / name / f"{name}.npz")
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=random)
    train, test = order[:num_records], order[num_records:]
    flips = torch.rand(num_records, generator=random) < FLIPPED
    others = torch.randint(1, CLASSES, (num_records,), generator=random)
    images, labels = x[train] - 0.25, torch.where(flips, (y[train] + others) % CLASSES, y[train])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))

    def losses(indices) -> Tensor:
        rows = torch.tensor(indices)
        return nn.functional.cross_entropy(model(images[rows]), labels[rows], reduction="none")

    @torch.no_grad()
    def scores() -> dict[str, float]:
        right = model(x[test] - 0.25).argmax(1) == y[test]
        return {"test accuracy, %": 100 * right.double().mean().item()}

    return Problem(model, losses, scores)
