# SPDX-License-Identifier: Apache-2.0
"""Linear regression whose label noise is alpha-stable: finite mean, infinite variance.

Reference: Chambers, Mallows, Stuck (1976), J. Amer. Statist. Assoc. 71 (the generator).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.estimators.problem import Problem

FEATURES, LENGTH, ALPHA, NUM_TEST = 50, 3.0, 1.5, 5_000


def stable(count: int, alpha: float, random: torch.Generator) -> Tensor:
    """`count` symmetric alpha-stable numbers of scale 1."""
    angle = (torch.rand(count, dtype=torch.float64, generator=random) - 0.5) * math.pi
    wait = -torch.log1p(-torch.rand(count, dtype=torch.float64, generator=random))
    first = torch.sin(alpha * angle) / torch.cos(angle) ** (1 / alpha)
    return first * (torch.cos((1 - alpha) * angle) / wait) ** ((1 - alpha) / alpha)


def drawn(num_records: int, seed: int) -> Problem:
    """Records, truth and a model at 0."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.randn(FEATURES, generator=random)
    truth *= LENGTH / truth.norm()
    x = torch.randn(num_records + NUM_TEST, FEATURES, generator=random)
    y = x @ truth + stable(len(x), ALPHA, random).float()
    model = nn.Linear(FEATURES, 1, bias=False)
    nn.init.zeros_(model.weight)

    def losses(indices) -> Tensor:
        rows = torch.tensor(indices)
        return (model(x[rows]).squeeze(1) - y[rows]).square() / 2

    @torch.no_grad()
    def scores() -> dict[str, float]:
        found, labels = model.weight.squeeze(0), y[num_records:]
        loss, least = (nn.functional.huber_loss(x[num_records:] @ w, labels).item() for w in (found, truth))
        return {
            "distance to the truth": (found - truth).norm().item(),
            "excess test Huber loss": loss - least,
        }

    return Problem(model, losses, scores)
