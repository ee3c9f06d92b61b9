# SPDX-License-Identifier: Apache-2.0
"""Gradients of ONE parameter for each of B examples, kept in the structure in which the layer made them.

The law of this file: every member means its `dense()` tensor, shape (B, *shape), and `sq_norm`, `inner`,
`weighted_sum`, `add` and `cross` agree with that tensor without forming it.

Shapes: B examples, K groups (1 except for grouped convolutions), T positions, P outputs, D inputs, V rows.

References: Goodfellow (2015), arXiv:1510.01799 (T = 1); Li et al. (2021), arXiv:2110.05679, section 4 (the
ghost norm <A A^T, G G^T>); Bu et al. (2022), arXiv:2210.00038 (one weighted product instead of B).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

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


@runtime_checkable
class SampleGrads(Protocol):
    """Per-example gradients of one parameter of shape `shape`, for `num_examples` examples.

    Guarantees
    ----------
    Sums and norms are accumulated in float32, or in float64 where the values are float64, whatever the dtype
    of the model: bfloat16 products are off by up to 10% when the positions of an example nearly cancel.
    `sq_norm` is rounded up by the most that it may err, and by the most that `weighted_sum` may for that example
    alone, for every input and not on average (`clipping.products`), so that neither the true gradient nor what
    is added exceeds it by more than 1e-5 (test_guarantee_norms_bound_gradients_that_cancel,
    test_guarantee_no_example_found_is_longer_than_its_norm); it is inf or NaN where it cannot be known.
    """

    @property
    def num_examples(self) -> int:
        """B."""
        ...

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        ...

    def dense(self) -> Tensor:
        """(B, *shape): the meaning of this structure, and the oracle of everything else."""
        ...

    def sq_norm(self) -> Tensor:
        """(B,): squared Euclidean norm of each example's gradient."""
        ...

    def inner(self, direction: Tensor) -> Tensor:
        """(B,): inner product with one direction (*shape) or with one direction per example (B, *shape)."""
        ...

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(*shape): sum over examples of weights[i] * gradient i, added to `into` where it is given."""
        ...

    def masked(self, keep: Tensor) -> SampleGrads:
        """The same gradients with those of examples where `keep` (B,) is False set to zero."""
        ...

    def part(self, examples: slice) -> SampleGrads:
        """The gradients of a slice of the batch, as views of what is held."""
        ...

    def rounding(self) -> Tensor:
        """(B,): most by which rounding moves `inner` with a direction of norm 1.

        It is relative to the terms that make up an example's gradient: where they cancel, it may exceed the norm.
        """
        ...


class Norms(NamedTuple):
    """Squared norms (B,), rounded up, and the part of each by which they were; None: no part that could matter."""

    squares: Tensor
    margins: Tensor | None = None

    @staticmethod
    def joined(parts: Sequence[Norms], none: Tensor) -> Norms:
        """Those of slices of a batch, one after the other; `none` are those of no example."""
        if not parts:
            return Norms(none)
        margins = [x.margins for x in parts if x.margins is not None]
        whole = torch.cat(margins) if len(margins) == len(parts) else None
        return Norms(torch.cat([x.squares for x in parts]), whole)


def norms_of(grads: SampleGrads) -> Norms:
    """The squared norms of `grads`, and how much of each is rounding up where its structure tells."""
    told: Callable[[], Norms] | None = getattr(grads, "norms", None)
    return Norms(grads.sq_norm()) if told is None else told()


def rounded_up(norms: Tensor, error: Tensor) -> Norms:
    """The squares of `norms` (B,), each of which may be too short by `error` (B,)."""
    squares = (norms + error).square()
    return Norms(squares, squares - norms.square())


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


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """Gradients held as they are, (B, *shape): biases, norms, and layers whose gradients are small.

    `why` says how they were found, where there was a choice.
    """

    values: Tensor
    why: str = "one path"

    @property
    def num_examples(self) -> int:
        """B."""
        return self.values.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        return self.values.shape[1:]

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self.values

    def sq_norm(self) -> Tensor:
        """(B,)."""
        return row_sq_norm(self.values)

    def inner(self, direction: Tensor) -> Tensor:
        """(B,)."""
        values = widen(self.values)
        # A matrix times a vector adds one number after the other: over 2^24 of them, float32 loses 2.7%.
        return flat_rows(values * direction.to(values.dtype)).sum(1)

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(*shape)."""
        values = flat_rows(widen(self.values))
        total = (weights.to(values.dtype) @ values).view(self.shape)
        return total if into is None else into.add_(total)

    def masked(self, keep: Tensor) -> Dense:
        """Gradients of examples outside `keep` set to zero."""
        return Dense(kept(self.values, keep))

    def part(self, examples: slice) -> Dense:
        """Gradients of a slice of the batch."""
        return Dense(self.values[examples])

    def rounding(self) -> Tensor:
        """(B,): relative to the norm, there being one term."""
        return rounding_of(row_norm(self.values), 1)
