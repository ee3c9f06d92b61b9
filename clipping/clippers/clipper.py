# SPDX-License-Identifier: Apache-2.0
"""Clippers: from the norms of each example's gradient to the weight with which it enters the sum.

The law of this file: with the weights that `clipper.weights` gives each group from the norms within that group
alone, the weighted gradient of one example has Euclidean norm at most `clipper.clip_norms[group]` within each
group, and at most `clipper.sensitivity` over all groups together. A non-finite norm gets weight 0. A group can
thus be clipped, summed and dropped inside the backward, as soon as its last layer has delivered.

Every weight here is clip_norm / length, rounded down, with a length that is at least the norm: an addition of
something positive never rounds to less than the norm. So weight * norm <= clip_norm in floating point too.

Shapes: K groups of parameters, B examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

SHORTEST = 1e-10
"""The least length that a norm is taken for: squares of shorter gradients vanish in float32."""


class Clipper(Protocol):
    """What a private sum needs to know of a clipping rule."""

    @property
    def sensitivity(self) -> float:
        """Most that adding or removing one example moves the clipped sum, in Euclidean norm."""
        ...

    @property
    def clip_norms(self) -> tuple[float, ...]:
        """Most that one example moves the clipped sum within each of the K groups, in Euclidean norm."""
        ...

    def groups(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """K groups that partition the parameter names; one norm per group and example."""
        ...

    def weights(self, norms: Tensor, group: int) -> Tensor:
        """(B,) norms within group number `group` to (B,) weights, finite and non-negative."""
        ...


def check_positive(name: str, value: float, remedy: str) -> None:
    """Raise ValueError for a value that is not a finite number > 0; True is none."""
    if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"expected a finite {name} > 0; got {value}; {remedy}")


def check_clip_norm(clip_norm: float) -> None:
    """Raise ValueError for a clip norm that bounds nothing."""
    remedy = "choose the norm beyond which one example's gradient is scaled down (1.0 is a usual start)"
    check_positive("clip_norm", clip_norm, remedy)


def quotient(clip_norm: float | Tensor, lengths: Tensor) -> Tensor:
    """(B,): clip_norm / length, rounded down."""
    # Clip norm, quotient and this product are each rounded by half an epsilon at most. (A number divided by a
    # tensor would be a product with its reciprocal, which is rounded more coarsely beside the largest norms.)
    top = clip_norm if isinstance(clip_norm, Tensor) else torch.full_like(lengths, clip_norm)
    return top / lengths * (1 - 4 * torch.finfo(lengths.dtype).eps)


def usable(weights: Tensor, norms: Tensor) -> Tensor:
    """(B,): the weights, zero where a norm is not finite or a weight is too small to be exact."""
    # A weight below the smallest normal number is rounded by a tenth and more, up as well as down.
    keep = torch.isfinite(norms) & (weights >= torch.finfo(norms.dtype).tiny)
    return torch.where(keep, weights, torch.zeros_like(weights))
