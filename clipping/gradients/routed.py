# SPDX-License-Identifier: Apache-2.0
"""Outer products that go to one of several blocks: the gradients of experts, without a block for each example.

Shapes: B examples, S slots (positions times the experts of each), E experts, P outputs, D inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipping.gradients.outer import summing, underflows
from clipping.gradients.sample_grads import Norms
from clipping.rounding.grams import Extent, bounded
from clipping.rounding.norms import accumulator_dtype, chunks, kept, per_example, rounding_of, row_norm, widen
from clipping.rounding.products import LONG, product, product_epsilons, row_sum, sum_epsilons


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """Gradients of a parameter (E, P, D): gradient[experts[s]] += left[s] right[s]^T.

    `experts` is (B, S), `left` (B, S, P), `right` (B, S, D).
    """

    experts: Tensor
    left: Tensor
    right: Tensor
    num_experts: int

    @property
    def num_examples(self) -> int:
        """B."""
        return self.left.shape[0]

    @property
    def shape(self) -> torch.Size:
        """(E, P, D)."""
        return torch.Size((self.num_experts, self.left.shape[-1], self.right.shape[-1]))

    def dense(self) -> Tensor:
        """(B, E, P, D)."""
        left, right = widen(self.left), widen(self.right)
        out = left.new_empty(self.num_examples, *self.shape)
        for expert in range(self.num_experts):
            mine = (self.experts == expert).unsqueeze(-1)
            out[:, expert] = product(torch.where(mine, left, 0).mT, torch.where(mine, right, 0))
        return out

    def sq_norm(self) -> Tensor:
        """(B,), through the Gram matrices of the slots, of which only pairs with one expert count; see `Outer`."""
        return self.norms().squares

    def norms(self) -> Norms:
        """`sq_norm`, and how much of it is rounding up."""
        num_slots = self.experts.shape[1]
        parts = []
        for part in chunks(self.num_examples, 3 * num_slots * num_slots):
            left, right, experts = widen(self.left[part]), widen(self.right[part]), self.experts[part]
            grams = product(left, left.mT), product(right, right.mT)
            traces = [gram.diagonal(dim1=1, dim2=2).sum(1) for gram in grams]
            # Multiplied by the mask, an overflow elsewhere stays visible: such an example has no norm.
            together = experts.unsqueeze(1) == experts.unsqueeze(2)
            counted = [gram * together for gram in grams]
            first, second = (
                Extent(trace, row_norm(gram), product_epsilons(x.shape[2]))
                for trace, gram, x in zip(traces, counted, (left, right), strict=True)
            )
            total, margin = bounded(
                row_sum(counted[0] * counted[1]), first, second, sum_epsilons(num_slots * num_slots)
            )
            error = summing(num_slots, total.dtype) * traces[0].sqrt() * traces[1].sqrt()
            squares = (total.sqrt() + error).square()
            margin = squares - total + margin
            parts.append(Norms(torch.where(underflows(traces[0], traces[1]), torch.inf, squares), margin))
        return Norms.joined(parts, self._none())

    def _none(self) -> Tensor:
        return torch.zeros(0, dtype=accumulator_dtype(self.left.dtype), device=self.left.device)

    def inner(self, direction: Tensor) -> Tensor:
        """(B,), without forming any example's gradient."""
        left, right = widen(self.left), widen(self.right)
        each = per_example(direction, self.shape)
        total = left.new_zeros(self.num_examples)
        for expert in range(self.num_experts):
            block = (direction[:, expert] if each else direction[expert]).to(left.dtype)
            mine = (self.experts == expert).unsqueeze(-1)
            total = total + ((torch.where(mine, left, 0) @ block) * right).flatten(1).sum(1)
        return total

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(E, P, D), as one matrix product per expert over the slots that went there."""
        left, right = widen(self.left), widen(self.right)
        left = (left * weights.to(left.dtype).view(-1, 1, 1)).flatten(0, 1)
        right, experts = right.flatten(0, 1), self.experts.flatten()
        total = left.new_zeros(self.shape) if into is None else into
        run = LONG if self.left.shape[1] > LONG else max(1, len(experts))
        for expert in range(self.num_experts):
            mine = (experts == expert).nonzero().squeeze(1)
            total[expert] += product(left[mine].T, right[mine], run)
        return total

    def masked(self, keep: Tensor) -> Routed:
        """Gradients of examples outside `keep` set to zero."""
        return Routed(self.experts, kept(self.left, keep), kept(self.right, keep), self.num_experts)

    def part(self, examples: slice) -> Routed:
        """Gradients of a slice of the batch."""
        return Routed(self.experts[examples], self.left[examples], self.right[examples], self.num_experts)

    def rounding(self) -> Tensor:
        """(B,): relative to |left| |right|, which bounds the terms by Cauchy and Schwarz."""
        # One expert after the other is added, and each is a sum by halves.
        length = self.left.shape[2] + self.num_experts
        return rounding_of(row_norm(self.left) * row_norm(self.right), length)
