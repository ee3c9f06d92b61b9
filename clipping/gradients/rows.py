# SPDX-License-Identifier: Apache-2.0
"""Rows of a table: the gradients of embeddings, without a one-hot.

Shapes: B examples, T positions, D width, V rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipping.gradients.sample_grads import Norms, rounded_up
from clipping.rounding.norms import ROUNDING, kept, per_example, rounding_of, row_norm, row_sq_norm, widen
from clipping.rounding.products import epsilons


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
        """(B,): rows of one index are summed first, at O(T log T + T D) and no one-hot.

        Guarantees
        ----------
        Rounded up by the error of those sums and of the weighted one: a row that n values of sizes s are added to
        errs by n / 2 epsilons of their total size in any order, so rows looked up once add next to nothing
        (test_guarantee_values_that_vanish_in_a_row_are_measured).
        """
        return self.norms().squares

    def norms(self) -> Norms:
        """`sq_norm`, and how much of it is rounding up."""
        values = widen(self.values)
        num_examples, num_positions, width = values.shape
        if num_positions == 1 or num_examples == 0:
            return Norms(row_sq_norm(values))
        segment = self._segments()
        sums = values.new_zeros(num_examples, num_positions, width)
        sums.scatter_add_(1, segment.unsqueeze(-1).expand_as(values), values)
        return rounded_up(row_norm(sums), self.forming(segment))

    def _segments(self) -> Tensor:
        """(B, T): positions of one index have one number, from 0 on."""
        order = self.indices.argsort(dim=1)
        ordered = self.indices.gather(1, order)
        changes = torch.zeros_like(ordered)
        changes[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
        return torch.empty_like(ordered).scatter_(1, order, changes.cumsum(1))

    def forming(self, segment: Tensor | None = None) -> Tensor:
        """(B,): most by which rounding moves the rows as they are added up, here and in a weighted sum."""
        segment = self._segments() if segment is None else segment
        sizes = torch.linalg.vector_norm(widen(self.values), dim=2)
        total = torch.zeros_like(sizes).scatter_add_(1, segment, sizes)
        count = torch.zeros_like(sizes).scatter_add_(1, segment, torch.ones_like(sizes))
        # Half an epsilon for each addition, here and in the weighted sum, whose values are scaled too.
        return epsilons(1, sizes.dtype) * row_norm(total * (count + ROUNDING))

    def inner(self, direction: Tensor) -> Tensor:
        """(B,)."""
        values = widen(self.values)
        if per_example(direction, self.shape):
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
        return Rows(self.indices, kept(self.values, keep), self.num_rows)

    def part(self, examples: slice) -> Rows:
        """Gradients of a slice of the batch."""
        return Rows(self.indices[examples], self.values[examples], self.num_rows)

    def rounding(self) -> Tensor:
        """(B,): relative to the sum of the norms of the values."""
        return rounding_of(torch.linalg.vector_norm(widen(self.values), dim=2).sum(1), 1)
