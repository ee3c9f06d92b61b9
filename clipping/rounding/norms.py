# SPDX-License-Identifier: Apache-2.0
"""Norms of rows, added up in pieces so that rounding stays within a proven bound.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Largest temporary, in elements, that a norm may allocate at a time (16 MiB in float32)."""

PIECE = 1 << 10
"""Numbers that one norm adds up at most."""

ROUNDING = 4
"""Fewest machine epsilons, relative to its terms, by which a norm made of several is rounded up."""

HALVES = 64
"""Machine epsilons, relative to its terms, allowed for a sum added up by halves (largest found on x86: 32)."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients of `dtype` are summed: float64 stays, everything else becomes float32."""
    if dtype.is_complex:  # .to(float32) would drop the imaginary part, and its share of the norm
        raise TypeError(
            f"expected gradients of real numbers; got {dtype}; hold the real and the imaginary part in a real "
            "parameter (torch.view_as_real)"
        )
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(values: Tensor) -> Tensor:
    """`values` in the dtype in which it is summed."""
    return values.to(accumulator_dtype(values.dtype))


def as_multiplied(values: Tensor, grad: Tensor) -> Tensor:
    """The input of a layer in the dtype in which the layer multiplied it, which is that of its output's gradient.

    Under autocast a layer rounds a float32 input to half precision, and autograd's own gradient is made of what it
    rounded. Factors of one dtype are also what the tensor cores of a device multiply exactly.
    """
    half = grad.dtype in (torch.bfloat16, torch.float16)
    return values.to(grad.dtype) if half and values.dtype == torch.float32 else values


def kept(values: Tensor, keep: Tensor) -> Tensor:
    """`values` (B, ...) with the rows where `keep` (B,) is False replaced by zeros."""
    # Zero times NaN is NaN, so a non-finite example is replaced, never multiplied by a zero weight.
    return torch.where(keep.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))


def rounding_of(terms: Tensor, length: int) -> Tensor:
    """Most that rounding moves a sum of inner products of `length` numbers; `terms` bounds their sizes in total.

    An inner product of n numbers errs by n / 2 epsilons at most, in whatever order it is added up (Higham (2002),
    Accuracy and Stability of Numerical Algorithms, section 3.1); the sum over them is done by halves.
    """
    return (HALVES + length / 2) * torch.finfo(terms.dtype).eps * terms


def per_example(direction: Tensor, shape: torch.Size) -> bool:
    """Whether `direction` holds one direction for each example, beside one of `shape` for all."""
    return direction.dim() == len(shape) + 1


def chunks(num_examples: int, elements_per_example: int) -> Iterator[slice]:
    """Slices of the batch such that `elements_per_example` times a slice stays under CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_per_example))
    for start in range(0, num_examples, step):
        yield slice(start, min(start + step, num_examples))


def flat_rows(values: Tensor) -> Tensor:
    """(B, N) from (B, ...)."""
    # (B, N), also for a scalar parameter, whose gradients (B,) have no dimension to flatten.
    return values.reshape(values.shape[0], values.shape[1:].numel())


def row_norm(values: Tensor) -> Tensor:
    """(B,): Euclidean norm of each row, in the accumulator dtype."""
    # vector_norm reads once; square().sum() writes a copy and was 16 times slower on large tensors. It adds one
    # number after the other, though: over 2^24 numbers in one go, float32 loses 1.4% of the norm.
    rows = flat_rows(widen(values))
    whole = rows.shape[1] // PIECE * PIECE
    if rows.shape[1] <= PIECE:
        return torch.linalg.vector_norm(rows, dim=1)
    first = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, PIECE)), dim=2)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
    pieces = torch.cat((first, rest), 1)
    return torch.linalg.vector_norm(pieces, dim=1) if pieces.shape[1] <= PIECE else row_norm(pieces)


def row_sq_norm(values: Tensor) -> Tensor:
    """(B,): squared Euclidean norm of each row."""
    return row_norm(values).square()
