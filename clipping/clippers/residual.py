# SPDX-License-Identifier: Apache-2.0
"""Clippers of what a first clipping cuts off: the second sum of error feedback, private or hidden.

With k = clip(g, first), the rest of a gradient is g - k, of the same direction and of length |g| - first where that
is positive. These weights multiply g, so both sums come from one structure and one norm.

Shapes: B examples.

References: Zhang et al. (2024), arXiv:2311.14632 (DiceSGD: the unclipped rest, hidden); the bounded and the
released rest are own derivations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clipping.clippers.clipper import check_clip_norm, check_positive, quotient, usable

_FIRST = "give the norm at which the gradients of the first sum are clipped"


@dataclass(frozen=True, slots=True)
class RestClipper:
    """Clips what a clipping at `first` cut off: g -> clip(g - clip(g, first), clip_norm).

    Beside the sum of clip(g, first), this sum has what that of clip(g, first + clip_norm) has and it has not. The
    bounded rest clip(g, G) - clip(g, first) is that of clip_norm = G - first.

    Guarantees
    ----------
    Sensitivity under adding or removing one example is `clip_norm`. The weight is min(|g| - first, clip_norm) / |g|
    where |g| > first, else 0, so that weight * |g| <= clip_norm; and with the weight of FlatClipper(first) it adds
    up to min(1, (first + clip_norm) / |g|), the weight of FlatClipper(first + clip_norm). Source: own derivation
    (test_guarantee_a_rest_moves_at_most_the_clip_norm, test_first_and_rest_make_up_one_clipping_at_their_sum).
    """

    clip_norm: float
    first: float

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        check_positive("first", self.first, _FIRST)

    @property
    def sensitivity(self) -> float:
        """`clip_norm`."""
        return self.clip_norm

    @property
    def clip_norms(self) -> tuple[float, ...]:
        """`(clip_norm,)`."""
        return (self.clip_norm,)

    def groups(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """One group of all parameters."""
        return (tuple(names),)

    def weights(self, norms: Tensor, group: int = 0) -> Tensor:
        """(B,) norms to (B,) weights, 0 up to `first`."""
        rest = (norms - self.first).clamp(0, self.clip_norm)
        return usable(quotient(rest, norms), norms)


@dataclass(frozen=True, slots=True)
class UnclippedRest:
    """All that a clipping at `first` cuts off: g -> g - clip(g, first), of any length.

    For a memory that is never released. Its sensitivity is infinite, so no finite noise makes it private.

    Guarantees
    ----------
    None on how far one example moves the sum. With the weight of FlatClipper(first) it adds up to 1
    (test_first_and_unclipped_rest_make_up_the_gradient).
    """

    first: float

    def __post_init__(self) -> None:
        check_positive("first", self.first, _FIRST)

    @property
    def sensitivity(self) -> float:
        """Infinite."""
        return math.inf

    @property
    def clip_norms(self) -> tuple[float, ...]:
        """`(inf,)`."""
        return (math.inf,)

    def groups(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """One group of all parameters."""
        return (tuple(names),)

    def weights(self, norms: Tensor, group: int = 0) -> Tensor:
        """(B,) norms to (B,) weights, 0 up to `first`."""
        return usable(quotient((norms - self.first).clamp_min(0), norms), norms)
