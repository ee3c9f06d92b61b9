# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for CUDA, beside PyTorch code that means the same and takes over wherever they do not serve.

Shapes: B examples, K groups, T positions, P outputs, D inputs.

Importing this package imports no triton; the first call of a kernel does. `serves` is the only question a
caller asks: it is False until `enable()`, without CUDA, without triton, for dtypes and shapes the kernels do not take, and on a
device where they disagreed with PyTorch (see `clipping.kernels.trust`).
"""

from __future__ import annotations

from torch import Tensor

from clipping.kernels.trust import (
    available,
    enable,
    is_enabled,
    serves,
    serves_total,
    trusted,
    without,
)

__all__ = [
    "available",
    "enable",
    "formed_sq_norm",
    "ghost_sq_norm",
    "is_enabled",
    "serves",
    "serves_total",
    "trusted",
    "weighted_sum",
    "without",
]

# Each import stands inside its function: triton may be missing, and loading it takes a while.


def ghost_sq_norm(left: Tensor, right: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(B,) squared norms, rounded up, and both traces; see `clipping.kernels.ghost`."""
    from clipping.kernels import ghost

    return ghost.ghost_sq_norm(left, right)


def formed_sq_norm(left: Tensor, right: Tensor) -> Tensor:
    """(B,) squared norms, rounded up; see `clipping.kernels.formed`."""
    from clipping.kernels import formed

    return formed.formed_sq_norm(left, right)


def weighted_sum(left: Tensor, right: Tensor, weights: Tensor, into: Tensor) -> Tensor:
    """`into` (K, P, D) plus the weighted sum of gradients, in place; see `clipping.kernels.totals`."""
    from clipping.kernels import totals

    return totals.weighted_sum(left, right, weights, into)
