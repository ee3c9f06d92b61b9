# SPDX-License-Identifier: Apache-2.0
"""Gradients of a few numbers each: what an audit's made-up records send to a parameter.

Shapes: B examples, E points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipping.rounding.norms import per_example, rounding_of, widen


@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """Zero but for E numbers: the gradient of example rows[e] is values[e] at places[e] of the flattened parameter.

    `rows`, `places` and `values` have shape (E,); no example has two points at one place.
    """

    rows: Tensor
    places: Tensor
    values: Tensor
    num_examples: int
    shape: torch.Size

    def dense(self) -> Tensor:
        """(B, *shape)."""
        values = widen(self.values)
        out = values.new_zeros(self.num_examples, self.shape.numel())
        out[self.rows, self.places] = values
        return out.view(self.num_examples, *self.shape)

    def sq_norm(self) -> Tensor:
        """(B,)."""
        return self._of_examples(widen(self.values).square())

    def inner(self, direction: Tensor) -> Tensor:
        """(B,)."""
        values = widen(self.values)
        if per_example(direction, self.shape):
            met = direction.flatten(1)[self.rows, self.places]
        else:
            met = direction.flatten()[self.places]
        return self._of_examples(values * met.to(values.dtype))

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(*shape)."""
        values = widen(self.values)
        total = values.new_zeros(self.shape) if into is None else into
        weighted = (weights.to(values.dtype)[self.rows] * values).to(total.dtype)
        # Sums may lie in another memory format, so that no flat view of them exists.
        return total.index_put_(torch.unravel_index(self.places, self.shape), weighted, accumulate=True)

    def masked(self, keep: Tensor) -> Points:
        """Gradients of examples outside `keep` set to zero."""
        left = keep.to(self.rows.device)[self.rows]
        return Points(self.rows[left], self.places[left], self.values[left], self.num_examples, self.shape)

    def part(self, examples: slice) -> Points:
        """Gradients of a slice of the batch."""
        start, stop, _ = examples.indices(self.num_examples)
        left = (self.rows >= start) & (self.rows < stop)
        rows = self.rows[left] - start
        return Points(rows, self.places[left], self.values[left], stop - start, self.shape)

    def rounding(self) -> Tensor:
        """(B,): relative to the norm."""
        return rounding_of(self.sq_norm().sqrt(), 1)

    def _of_examples(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.num_examples).index_add_(0, self.rows, values)
