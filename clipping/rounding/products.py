# SPDX-License-Identifier: Apache-2.0
"""Matrix products and sums that are added up by halves, so that their rounding has a proven bound.

The law of this file: the bounds hold whatever order a library adds a run in, and for every input, also for one
that is chosen to round one way.

Shapes: M x N of a product, L terms of each inner product.

References: Jeannerod and Rump (2013), "Improved error bounds for inner products in floating-point arithmetic",
SIAM J. Matrix Anal. Appl. 34(2) (n u for n terms in any order, u half an epsilon); Higham (2002), Accuracy and
Stability of Numerical Algorithms, section 4.2 (sums by pairs).
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipping.rounding.norms import ROUNDING

RUN = 256
"""Terms that a product adds up in one go. Fewer lengthen norms less, and cost more (64: half again as much)."""

LONG = 1024
"""Positions that a weighted sum adds up in one go; it is split only where an example has more."""

SLACK = 1.01
"""What rounding may take off the factors of a bound, and terms of second order."""

_PIECE = 64


def product(left: Tensor, right: Tensor, run: int = RUN) -> Tensor:
    """(..., M, N) from (..., M, L) and (..., L, N), at most `run` terms at a time.

    Guarantees
    ----------
    Each number errs by at most product_epsilons(L, run) epsilons of the sum of the sizes of its terms.
    Proof: an inner product of n terms errs by n / 2 epsilons of that sum in any order (Jeannerod and Rump (2013),
    theorem 3.1), and each of the additions by halves, one in another, by half an epsilon of what it adds. The
    additions are operations of their own: a library that is asked to add to a matrix may begin with it, and
    small terms would vanish beside it (test_guarantee_a_product_errs_by_less_than_its_bound).
    """
    length = left.shape[-1]
    if length <= run:
        return torch.matmul(left, right)
    half = -(-length // run) // 2 * run
    total = product(left[..., :half], right[..., :half, :], run)
    return total.add_(product(left[..., half:], right[..., half:, :], run))


def product_epsilons(length: int, run: int = RUN) -> float:
    """Machine epsilons, relative to the sizes of its terms, by which an inner product of `length` terms may err."""
    # One besides: factors are rounded too when they are scaled.
    return max(ROUNDING, 1 + min(length, run) / 2 + _halvings(length, run) / 2)


def _halvings(length: int, run: int) -> int:
    return max(0, -(-length // run) - 1).bit_length()


def row_sum(values: Tensor) -> Tensor:
    """(B,) sums of (B, ...), a few numbers at a time."""
    rows = values.flatten(1)
    while rows.shape[1] > _PIECE:
        whole = rows.shape[1] // _PIECE * _PIECE
        sums = rows[:, :whole].unflatten(1, (-1, _PIECE)).sum(2)
        rows = sums if whole == rows.shape[1] else torch.cat((sums, rows[:, whole:]), 1)
    return rows.sum(1)


def sum_epsilons(length: int) -> float:
    """Machine epsilons, relative to the sizes of its terms, by which `row_sum` of `length` products may err."""
    count = 0.0
    while length > _PIECE:
        count += _PIECE / 2
        length = length // _PIECE + length % _PIECE
    return max(ROUNDING, 1 + count + length / 2)


def epsilons(count: float, dtype: torch.dtype) -> float:
    """`count` machine epsilons of `dtype`, with room for the rounding of what they are multiplied by."""
    return SLACK * count * torch.finfo(dtype).eps
