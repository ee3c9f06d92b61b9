# SPDX-License-Identifier: Apache-2.0
"""One step of an estimator, as data: what each example adds, and what becomes of what was released."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from clipping import ClippedSum, Contribution

Vectors = Mapping[str, Tensor]
"""Tensors of the parameters' shapes, by parameter name (released ones also: prefix and name, names of counts)."""


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """One step of an estimator.

    `finish` turns the released vectors, divided by the expected batch size, into the gradient; it is called once, and
    only if the step is released. Given `again`, the batch is kept and summed `rounds` times, each time as the
    contribution that `again` makes of the last release; the noise of each round is sqrt(rounds) times as large.
    `previous` are parameters at which each example's gradient is taken a second time, and subtracted. `fold` may
    change the sum before the noise, given what was not released. `direct`: the gradient is a released vector, with the
    noise of the mechanism and no other.
    """

    contribution: Contribution
    finish: Callable[[Vectors], Vectors]
    rounds: int = 1
    again: Callable[[Vectors], Contribution] | None = None
    previous: Vectors | None = None
    fold: Callable[[ClippedSum, Vectors], ClippedSum] | None = None
    direct: bool = False
