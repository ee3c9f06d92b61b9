# SPDX-License-Identifier: Apache-2.0
"""A task drawn by a seed, as the benchmark of estimators trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Problem:
    """A task drawn by a seed: `losses` of records by index, shape (B,), and `scores` of the model as it is.

    `lengths`, where given, sort a batch before it is cut into micro-batches.
    """

    model: nn.Module
    losses: Callable[[Sequence[int]], Tensor]
    scores: Callable[[], Mapping[str, float]]
    lengths: Sequence[int] | None = None
