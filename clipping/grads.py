# SPDX-License-Identifier: Apache-2.0
"""Gradients of ONE parameter for each of B examples, kept in the structure in which the layer made them.

The law of this file: every member means its `dense()` tensor, shape (B, *shape), and `sq_norm`, `inner`,
`weighted_sum`, `add` and `cross` agree with that tensor without forming it.

Shapes: B examples, K groups (1 except for grouped convolutions), T positions, P outputs, D inputs, V rows.

References: Goodfellow (2015), arXiv:1510.01799 (T = 1); Li et al. (2021), arXiv:2110.05679, section 4 (the
ghost norm <A A^T, G G^T>); Bu et al. (2022), arXiv:2210.00038 (one weighted product instead of B).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Largest temporary, in elements, that a norm may allocate at a time (16 MiB in float32)."""

ROUNDING = 4
"""Machine epsilons, relative to the terms of a norm, by which it is rounded up (measured error: below 1)."""


@runtime_checkable
class SampleGrads(Protocol):
    """Per-example gradients of one parameter of shape `shape`, for `num_examples` examples.

    Guarantees
    ----------
    Sums and norms are accumulated in float32, or in float64 where the values are float64, whatever the dtype
    of the model: bfloat16 products are off by up to 10% when the positions of an example nearly cancel.
    `sq_norm` is rounded up by its own rounding error, so that `weighted_sum` never exceeds what it promises
    (test_guarantee_norms_bound_gradients_that_cancel); it is inf or NaN where it cannot be known.
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


def _keep(values: Tensor, keep: Tensor) -> Tensor:
    # Zero times NaN is NaN, so a non-finite example is replaced, never multiplied by a zero weight.
    return torch.where(keep.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))


def _rounded_up(sq_norm: Tensor, largest: Tensor) -> Tensor:
    """`sq_norm` plus the rounding error of a sum whose terms are at most `largest` in total.

    Where the terms of an example cancel, what remains is rounding: it may come out as zero while the gradient
    that enters the sum is not. Rounded up, the norm bounds that gradient; elsewhere it changes by parts in 10^5.
    """
    return sq_norm.clamp_min(0) + ROUNDING * torch.finfo(sq_norm.dtype).eps * largest


def _per_example(direction: Tensor, shape: torch.Size) -> bool:
    return direction.dim() == len(shape) + 1


def chunks(num_examples: int, elements_per_example: int) -> Iterator[slice]:
    """Slices of the batch such that `elements_per_example` times a slice stays under CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_per_example))
    for start in range(0, num_examples, step):
        yield slice(start, min(start + step, num_examples))


def _flat(values: Tensor) -> Tensor:
    # (B, N), also for a scalar parameter, whose gradients (B,) have no dimension to flatten.
    return values.reshape(values.shape[0], values.shape[1:].numel())


def _norm(values: Tensor) -> Tensor:
    # vector_norm reads once; square().sum() writes a copy and was 16 times slower on large tensors.
    return torch.linalg.vector_norm(_flat(widen(values)), dim=1)


def _row_sq_norm(values: Tensor) -> Tensor:
    return _norm(values).square()


def _gram_product(left: Tensor, right: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(B,) sum of the product of both Gram matrices (symmetric, so half the blocks off the diagonal), and traces."""
    num_positions = left.shape[2]
    middle = num_positions // 2 if num_positions >= 64 else 0
    total, traces = None, None
    for rows, columns in ((slice(middle, None), slice(None)), (slice(middle), slice(middle))):
        if rows.stop == 0:
            continue
        grams = [torch.matmul(x[:, :, rows], x[:, :, columns].mT) for x in (left, right)]
        own = [gram[:, :, :, rows].diagonal(dim1=2, dim2=3).sum((1, 2)) for gram in grams]
        product = grams[0].mul_(grams[1])
        value = product.flatten(1).sum(1)
        if columns.stop is None and middle:
            value = value + product[:, :, :, :middle].flatten(1).sum(1)
        total = value if total is None else total + value
        traces = own if traces is None else [x + y for x, y in zip(traces, own, strict=True)]
    assert total is not None and traces is not None
    return total, (traces[0], traces[1])


def _underflows(left_trace: Tensor, right_trace: Tensor) -> Tensor:
    # Squares of tiny values vanish; beside huge ones the gradient need not. Such an example has no norm.
    tiny = torch.finfo(left_trace.dtype).tiny
    low, high = torch.minimum(left_trace, right_trace), torch.maximum(left_trace, right_trace)
    return (low < tiny**0.75) & (high > tiny**-0.5)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """Gradients held as they are, (B, *shape): biases, norms, and layers whose gradients are small."""

    values: Tensor

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
        return _row_sq_norm(self.values)

    def inner(self, direction: Tensor) -> Tensor:
        """(B,)."""
        values = _flat(widen(self.values))
        if _per_example(direction, self.shape):
            return (values * _flat(direction)).sum(1)
        return values @ direction.flatten().to(values.dtype)

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(*shape)."""
        values = _flat(widen(self.values))
        total = (weights.to(values.dtype) @ values).view(self.shape)
        return total if into is None else into.add_(total)

    def masked(self, keep: Tensor) -> Dense:
        """Gradients of examples outside `keep` set to zero."""
        return Dense(_keep(self.values, keep))


@dataclass(frozen=True, slots=True, eq=False)
class Outer:
    """Sums over positions of outer products: gradient[k] = sum_t left[k, t] right[k, t]^T.

    `left` is (B, K, T, P), `right` is (B, K, T, D), and the K blocks of (P, D) lie one after another in the
    parameter of shape `shape` (K * P * D elements). Linear and convolution have left = output gradient and
    right = input; transformers' Conv1D, which stores its weight the other way round, swaps them.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    @property
    def num_examples(self) -> int:
        """B."""
        return self.left.shape[0]

    def dense(self) -> Tensor:
        """(B, *shape)."""
        product = torch.matmul(widen(self.left).mT, widen(self.right))
        return product.reshape(self.num_examples, *self.shape)

    def sq_norm(self) -> Tensor:
        """(B,), through the Gram matrices or through the gradients, whichever costs less."""
        _, num_groups, num_positions, num_out = self.left.shape
        num_in = self.right.shape[-1]
        if num_positions == 1:
            left = torch.linalg.vector_norm(widen(self.left), dim=(2, 3)).square()
            right = torch.linalg.vector_norm(widen(self.right), dim=(2, 3)).square()
            return torch.where(_underflows(left.sum(1), right.sum(1)), torch.inf, (left * right).sum(1))
        if num_positions * (num_out + num_in) <= num_out * num_in:
            return self._ghost_sq_norm(2 * num_groups * num_positions * num_positions)
        return self._formed_sq_norm(num_groups * num_out * num_in)

    def _ghost_sq_norm(self, elements: int) -> Tensor:
        parts = []
        for part in chunks(self.num_examples, elements):
            left, right = widen(self.left[part]), widen(self.right[part])
            total, traces = _gram_product(left, right)
            sq_norm = _rounded_up(total, traces[0] * traces[1])
            parts.append(torch.where(_underflows(*traces), torch.inf, sq_norm))
        return torch.cat(parts) if parts else self._none()

    def _formed_sq_norm(self, elements: int) -> Tensor:
        parts = []
        for part in chunks(self.num_examples, elements):
            left, right = widen(self.left[part]), widen(self.right[part])
            formed = torch.linalg.vector_norm(torch.matmul(left.mT, right).flatten(1), dim=1)
            error = ROUNDING * torch.finfo(formed.dtype).eps * _norm(left) * _norm(right)
            parts.append((formed + error).square())
        return torch.cat(parts) if parts else self._none()

    def _none(self) -> Tensor:
        return torch.zeros(0, dtype=accumulator_dtype(self.left.dtype), device=self.left.device)

    def inner(self, direction: Tensor) -> Tensor:
        """(B,), without forming any example's gradient."""
        left, right = widen(self.left), widen(self.right)
        num_groups, num_out, num_in = left.shape[1], left.shape[3], right.shape[3]
        lead = (self.num_examples,) if _per_example(direction, self.shape) else ()
        blocks = direction.reshape(*lead, num_groups, num_out, num_in).to(left.dtype)
        return (torch.matmul(left, blocks) * right).flatten(1).sum(1)

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(*shape), as one matrix product per group over all examples and positions."""
        left, right = widen(self.left), widen(self.right)
        scale = weights.to(left.dtype).view(-1, 1, 1, 1)
        if left.shape[-1] <= right.shape[-1]:
            left = left * scale
        else:
            right = right * scale
        num_groups = left.shape[1]
        if num_groups == 1:
            flat_left, flat_right = left.flatten(0, 2), right.flatten(0, 2)
            if into is not None and into.is_contiguous():
                into.view(flat_left.shape[1], flat_right.shape[1]).addmm_(flat_left.T, flat_right)
                return into
            total = flat_left.T @ flat_right
        else:
            total = torch.einsum("bktp,bktd->kpd", left, right)
        total = total.reshape(self.shape)
        return total if into is None else into.add_(total)

    def masked(self, keep: Tensor) -> Outer:
        """Gradients of examples outside `keep` set to zero."""
        return Outer(_keep(self.left, keep), _keep(self.right, keep), self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows added to a table: gradient[indices[t]] += values[t]. Indices (B, T), values (B, T, D), V rows."""

    indices: Tensor
    values: Tensor
    num_rows: int

    @property
    def num_examples(self) -> int:
        """B."""
        return self.values.shape[0]

    @property
    def shape(self) -> torch.Size:
        """(V, D)."""
        return torch.Size((self.num_rows, self.values.shape[-1]))

    def dense(self) -> Tensor:
        """(B, V, D)."""
        values = widen(self.values)
        out = values.new_zeros(self.num_examples, *self.shape)
        index = self.indices.unsqueeze(-1).expand_as(values)
        return out.scatter_add_(1, index, values)

    def sq_norm(self) -> Tensor:
        """(B,): rows of one index are summed first, at O(T log T + T D) and no one-hot."""
        values = widen(self.values)
        num_examples, num_positions, width = values.shape
        if num_positions == 1 or num_examples == 0:
            return _row_sq_norm(values)
        order = self.indices.argsort(dim=1)
        ordered = self.indices.gather(1, order)
        changes = torch.zeros_like(ordered)
        changes[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
        segment = torch.empty_like(ordered).scatter_(1, order, changes.cumsum(1))
        sums = values.new_zeros(num_examples, num_positions, width)
        sums.scatter_add_(1, segment.unsqueeze(-1).expand_as(values), values)
        return _rounded_up(_row_sq_norm(sums), _row_sq_norm(values))

    def inner(self, direction: Tensor) -> Tensor:
        """(B,)."""
        values = widen(self.values)
        if _per_example(direction, self.shape):
            picked = direction.gather(1, self.indices.unsqueeze(-1).expand_as(values))
        else:
            picked = direction[self.indices]
        return (values * picked.to(values.dtype)).flatten(1).sum(1)

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(V, D)."""
        values = widen(self.values)
        scaled = values * weights.to(values.dtype).view(-1, 1, 1)
        total = values.new_zeros(self.shape) if into is None else into
        return total.index_add_(0, self.indices.flatten(), scaled.flatten(0, 1))

    def masked(self, keep: Tensor) -> Rows:
        """Gradients of examples outside `keep` set to zero."""
        return Rows(self.indices, _keep(self.values, keep), self.num_rows)


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """The sum of different structures over the same parameter: an embedding tied to the output head."""

    parts: tuple[SampleGrads, ...]

    @property
    def num_examples(self) -> int:
        """B."""
        return self.parts[0].num_examples

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        return self.parts[0].shape

    def dense(self) -> Tensor:
        """(B, *shape)."""
        total = self.parts[0].dense()
        for part in self.parts[1:]:
            total = total + part.dense()
        return total

    def sq_norm(self) -> Tensor:
        """(B,), with the exact cross terms: |a + b|^2 = |a|^2 + |b|^2 + 2 <a, b>."""
        largest = self.parts[0].sq_norm()
        for part in self.parts[1:]:
            largest = largest + part.sq_norm()
        total = largest
        for first, second in combinations(self.parts, 2):
            total = total + 2 * cross(first, second)
        return _rounded_up(total, largest)

    def inner(self, direction: Tensor) -> Tensor:
        """(B,)."""
        total = self.parts[0].inner(direction)
        for part in self.parts[1:]:
            total = total + part.inner(direction)
        return total

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(*shape)."""
        for part in self.parts:
            into = part.weighted_sum(weights, into)
        assert into is not None
        return into

    def masked(self, keep: Tensor) -> Sum:
        """Gradients of examples outside `keep` set to zero."""
        return Sum(tuple(part.masked(keep) for part in self.parts))


def cross(first: SampleGrads, second: SampleGrads) -> Tensor:
    """(B,): inner product, example by example, of two structures over the same parameter."""
    match first, second:
        case Outer(), Rows():
            return _cross_outer_rows(first, second)
        case Rows(), Outer():
            return _cross_outer_rows(second, first)
        case Dense(), _:
            return second.inner(widen(first.values))
        case _, Dense():
            return first.inner(widen(second.values))
        case _:
            return first.inner(second.dense())


def _cross_outer_rows(outer: Outer, rows: Rows) -> Tensor:
    # <sum_t l_t r_t^T, sum_s e_{v_s} z_s^T> = sum_{t,s} l_t[v_s] <r_t, z_s>: a gather and one product, no one-hot.
    num_positions = max(outer.left.shape[2], rows.indices.shape[1])
    parts = []
    for part in chunks(outer.num_examples, 2 * num_positions * num_positions):
        left, right = outer.left[part][:, 0], widen(outer.right[part][:, 0])
        index = rows.indices[part].unsqueeze(1).expand(-1, left.shape[1], -1)
        picked = widen(left.gather(2, index))
        parts.append((picked * torch.matmul(right, widen(rows.values[part]).mT)).flatten(1).sum(1))
    return torch.cat(parts) if parts else outer._none()


def add(first: SampleGrads, second: SampleGrads) -> SampleGrads:
    """The sum of two structures over the same parameter: a layer used twice, or a tied weight.

    Structures of one kind merge (more positions, or a sum); different kinds become a `Sum` with at most one
    member of each kind, whose norm has the exact cross term.
    """
    if first.num_examples != second.num_examples or first.shape != second.shape:
        raise ValueError(
            "expected gradients of one parameter for the same examples; got "
            f"{first.num_examples} examples of {tuple(first.shape)} and {second.num_examples} of "
            f"{tuple(second.shape)}; use every shared layer with the whole batch in its first dimension"
        )
    if isinstance(second, Sum):
        for part in second.parts:
            first = add(first, part)
        return first
    if isinstance(first, Sum):
        return _add_part(first, second)
    merged = _merge(first, second)
    return Sum((first, second)) if merged is None else merged


def _add_part(total: Sum, part: SampleGrads) -> Sum:
    for index, member in enumerate(total.parts):
        merged = _merge(member, part)
        if merged is not None:
            return Sum((*total.parts[:index], merged, *total.parts[index + 1 :]))
    return Sum((*total.parts, part))


def _merge(first: SampleGrads, second: SampleGrads) -> SampleGrads | None:
    match first, second:
        case Dense(), Dense():
            return Dense(widen(first.values) + widen(second.values))
        case Outer(), Outer() if first.left.shape[1] == second.left.shape[1]:
            left = torch.cat((first.left, second.left), 2)
            return Outer(left, torch.cat((first.right, second.right), 2), first.shape)
        case Rows(), Rows():
            indices = torch.cat((first.indices, second.indices), 1)
            return Rows(indices, torch.cat((first.values, second.values), 1), first.num_rows)
        case _:
            return None
