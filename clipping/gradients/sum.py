# SPDX-License-Identifier: Apache-2.0
"""Sums of structures over one parameter: layers used twice, and tied weights with their exact cross terms.

Shapes: B examples, T positions, P outputs, D inputs, V rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from clipping.gradients.convolved import Convolved
from clipping.gradients.dense import Dense
from clipping.gradients.outer import Outer, forming
from clipping.gradients.routed import Routed
from clipping.gradients.rows import Rows
from clipping.gradients.sample_grads import Norms, SampleGrads, norms_of
from clipping.rounding.norms import CHUNK_ELEMENTS, chunks, row_norm, widen
from clipping.rounding.products import epsilons, product, product_epsilons, row_sum, sum_epsilons

SQUARES = 64
"""Machine epsilons allowed for squared norms and their sum, whose rounding remains when the parts cancel."""


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
        """(B,), with the exact cross terms: |a + b|^2 = |a|^2 + |b|^2 + 2 <a, b>.

        Guarantees
        ----------
        Rounded up by what each inner product may err and by SQUARES epsilons of the squares, which remain when
        the parts cancel (test_guarantee_a_tied_sum_that_cancels_is_measured).
        """
        return self.norms().squares

    def norms(self) -> Norms:
        """`sq_norm`, and how much of it is rounding up."""
        found = [norms_of(part) for part in self.parts]
        squares = [part.squares for part in found]
        largest = torch.stack(squares).sum(0)
        total, error = largest, SQUARES * torch.finfo(largest.dtype).eps * largest
        for first, second in combinations(range(len(self.parts)), 2):
            value, most = _crossed(self.parts[first], self.parts[second], squares[first].sqrt())
            total, error = total + 2 * value, error + 2 * most
        margin = torch.stack([error, *(x.margins for x in found if x.margins is not None)]).sum(0)
        return Norms(torch.where(torch.isfinite(total), total.clamp_min(0) + error, torch.inf), margin)

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

    def part(self, examples: slice) -> Sum:
        """Gradients of a slice of the batch."""
        return Sum(tuple(part.part(examples) for part in self.parts))

    def rounding(self) -> Tensor:
        """(B,): that of all parts together."""
        total = self.parts[0].rounding()
        for part in self.parts[1:]:
            total = total + part.rounding()
        return total


def cross(first: SampleGrads, second: SampleGrads) -> Tensor:
    """(B,): inner product, example by example, of two structures over the same parameter."""
    return _crossed(first, second, None)[0]


def _crossed(first: SampleGrads, second: SampleGrads, length: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B,) inner products, and the most by which they err; `length` is the norm of `first`."""
    match first, second:
        case Outer(), Rows():
            return _cross_outer_rows(first, second)
        case Rows(), Outer():
            return _cross_outer_rows(second, first)
        case Dense(), _:
            return second.inner(widen(first.values)), second.rounding() * row_norm(first.values)
        case _, Dense():
            return first.inner(widen(second.values)), first.rounding() * row_norm(second.values)
        case _:
            formed = second.dense()
            length = first.sq_norm().sqrt() if length is None else length
            return first.inner(formed), first.rounding() * row_norm(formed) + length * _forming(second)


def _forming(grads: SampleGrads) -> Tensor:
    """(B,): most by which rounding moves the gradients as they are formed."""
    match grads:
        case Outer() | Routed():
            positions = grads.left.shape[-2]
            return forming(positions, grads.left.dtype) * row_norm(grads.left) * row_norm(grads.right)
        case Rows():
            return grads.forming()
        case Convolved():
            return grads.forming()
        case _:
            return grads.rounding()


def _cross_outer_rows(outer: Outer, rows: Rows) -> tuple[Tensor, Tensor]:
    # <sum_t l_t r_t^T, sum_s e_{v_s} z_s^T> = sum_{t,s} l_t[v_s] <r_t, z_s>: a gather and one product, no one-hot.
    num_looked_up = rows.indices.shape[1]
    step = max(1, min(outer.left.shape[2], CHUNK_ELEMENTS // max(1, 2 * num_looked_up)))
    steps = -(-outer.left.shape[2] // step)
    most = product_epsilons(outer.right.shape[3]) + sum_epsilons(step * num_looked_up) + steps / 2
    parts, errors = [outer._none()], [outer._none()]
    for part in chunks(outer.num_examples, 2 * step * num_looked_up):
        index, values = rows.indices[part].unsqueeze(1), widen(rows.values[part]).mT
        total = outer._none().new_zeros(index.shape[0])
        terms = torch.zeros_like(total)
        sizes = torch.linalg.vector_norm(values, dim=1).unsqueeze(2)
        pieces = (x[part][:, 0].split(step, dim=1) for x in (outer.left, outer.right))
        for left, right in zip(*pieces, strict=True):
            picked, right = widen(left.gather(2, index.expand(-1, left.shape[1], -1))), widen(right)
            # The sizes of the terms themselves: where tokens repeat, a product of norms would be far above them.
            reach = torch.linalg.vector_norm(right, dim=2)
            terms += ((picked.abs() @ sizes).squeeze(2) * reach).sum(1)
            total += row_sum(picked.mul_(product(right, values)))
        parts.append(total)
        errors.append(epsilons(most, total.dtype) * terms)
    return torch.cat(parts), torch.cat(errors)


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
        case Routed(), Routed():
            experts = torch.cat((first.experts, second.experts), 1)
            left = torch.cat((first.left, second.left), 1)
            return Routed(experts, left, torch.cat((first.right, second.right), 1), first.num_experts)
        case Rows(), Rows():
            indices = torch.cat((first.indices, second.indices), 1)
            return Rows(indices, torch.cat((first.values, second.values), 1), first.num_rows)
        case _:
            return None
