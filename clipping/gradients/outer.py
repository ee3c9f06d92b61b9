# SPDX-License-Identifier: Apache-2.0
"""Sums of outer products: the gradients of linear layers and convolutions, and their norms without forming them.

Shapes: B examples, K groups (1 except for grouped convolutions), T positions, P outputs, D inputs.

References: Goodfellow (2015), arXiv:1510.01799 (T = 1); Li et al. (2021), arXiv:2110.05679, section 4 (the
ghost norm <A A^T, G G^T>); Bu et al. (2022), arXiv:2210.00038 (one weighted product instead of B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipping import kernels
from clipping.gradients.path_costs import Sizes
from clipping.gradients.sample_grads import Norms, rounded_up
from clipping.rounding.grams import Workspace, gram_product
from clipping.rounding.norms import (
    CHUNK_ELEMENTS,
    accumulator_dtype,
    chunks,
    kept,
    per_example,
    rounding_of,
    row_norm,
    row_sq_norm,
    widen,
)
from clipping.rounding.products import LONG, epsilons, product, product_epsilons


def underflows(left_trace: Tensor, right_trace: Tensor) -> Tensor:
    """(B,): whether a squared norm is lost, given the traces of both Gram matrices."""
    # Squares of tiny values vanish; beside huge ones the gradient need not. Such an example has no norm.
    tiny = torch.finfo(left_trace.dtype).tiny
    low, high = torch.minimum(left_trace, right_trace), torch.maximum(left_trace, right_trace)
    return (low < tiny**0.75) & (high > tiny**-0.5)


def forming(num_positions: int, dtype: torch.dtype) -> float:
    """Most that rounding moves a gradient as it is formed, relative to |left| |right|."""
    return epsilons(product_epsilons(num_positions), dtype)


def summing(num_positions: int, dtype: torch.dtype) -> float:
    """Most that rounding moves what one example adds to a weighted sum, relative to weight * |left| |right|."""
    return epsilons(product_epsilons(num_positions, LONG), dtype)


def _inner(first: Tensor, second: Tensor, blocks: Tensor) -> Tensor:
    first, second = widen(first), widen(second)
    blocks = blocks.to(first.dtype)
    if len(blocks) == 1 and blocks.dim() == 3:  # one product, where matmul would repeat the direction
        moved = (first.flatten(0, 2) @ blocks[0]).view(second.shape)
    else:
        moved = torch.matmul(first, blocks)
    return moved.mul_(second).flatten(1).sum(1)


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

    def sizes(self) -> Sizes:
        """What decides on the path to norm and sum."""
        _, num_groups, num_positions, num_out = self.left.shape
        num_in = self.right.shape[3]
        held = num_groups * num_positions * (num_out + num_in)
        return Sizes(num_groups, num_positions, num_out, num_in, held)

    def dense(self) -> Tensor:
        """(B, *shape)."""
        formed = product(widen(self.left).mT, widen(self.right))
        return formed.reshape(self.num_examples, *self.shape)

    def sq_norm(self, space: Workspace | None = None) -> Tensor:
        """(B,), through the Gram matrices or through the gradients, whichever costs less.

        Guarantees
        ----------
        Rounded up, so that it bounds the true norm and that of what `weighted_sum` adds for the example alone:
        by what the Gram matrices may err (`clipping.rounding.grams.bounded`) or the forming (`forming`), and by what the
        weighted sum may, each a bound for every order of addition and every input
        (test_guarantee_tails_that_vanish_beside_ones_are_measured, test_guarantee_positions_that_vanish_beside_ones_are_measured).
        """
        return self.norms(space).squares

    def norms(self, space: Workspace | None = None) -> Norms:
        """`sq_norm`, and how much of it is rounding up."""
        _, _, num_positions, num_out = self.left.shape
        num_in = self.right.shape[-1]
        if num_positions == 0:
            return Norms(self._none().new_zeros(self.num_examples))
        if num_positions == 1:
            left, right = row_sq_norm(self.left.flatten(0, 1)), row_sq_norm(self.right.flatten(0, 1))
            left, right = left.view(self.left.shape[:2]), right.view(self.right.shape[:2])
            return Norms(torch.where(underflows(left, right).any(1), torch.inf, (left * right).sum(1)))
        if num_positions * (num_out + num_in) <= num_out * num_in:
            return self._ghost_norms(space)
        return self.formed_norms()

    def _ghost_norms(self, space: Workspace | None) -> Norms:
        if kernels.serves(self.left, self.right):
            sq_norm, traces = kernels.ghost_sq_norm(self.left, self.right)
            return Norms(torch.where(underflows(*traces), torch.inf, sq_norm))
        _, num_groups, num_positions, _ = self.left.shape
        # Many layers read one input; none has the same output gradient twice.
        known = None if space is None else space.gram(self.right)
        parts = []
        for part in chunks(self.num_examples, 2 * num_groups * num_positions * num_positions):
            left, right = widen(self.left[part]), widen(self.right[part])
            (total, margin), traces = gram_product(left, right, None if known is None else known.part(part))
            # The weighted sum errs too, and what it adds must not be longer than what was measured.
            error = summing(num_positions, total.dtype) * traces[0].sqrt() * traces[1].sqrt()
            squares = (total.sqrt() + error).square()
            margin = squares - total + margin
            parts.append(Norms(torch.where(underflows(*traces), torch.inf, squares), margin))
        return Norms.joined(parts, self._none())

    def formed_norms(self) -> Norms:
        """(B,), through the gradients, of which a chunk is formed at a time; how much of it is rounding up."""
        if kernels.serves(self.left, self.right):
            return Norms(kernels.formed_sq_norm(self.left, self.right))
        num_groups, num_out, num_in = self.left.shape[1], self.left.shape[3], self.right.shape[3]
        rows = max(1, min(num_out, CHUNK_ELEMENTS // max(1, num_groups * num_in)))
        parts = []
        for part in chunks(self.num_examples, num_groups * rows * num_in):
            left, right = widen(self.left[part]), widen(self.right[part])
            norms = [row_norm(product(some.mT, right)) for some in left.split(rows, dim=3)]
            formed = torch.linalg.vector_norm(torch.stack(norms), dim=0)
            error = forming(left.shape[2], left.dtype) + summing(left.shape[2], left.dtype)
            parts.append(rounded_up(formed, error * row_norm(left) * row_norm(right)))
        return Norms.joined(parts, self._none())

    def _none(self) -> Tensor:
        return torch.zeros(0, dtype=accumulator_dtype(self.left.dtype), device=self.left.device)

    def inner(self, direction: Tensor) -> Tensor:
        """(B,), without forming any example's gradient."""
        each = per_example(direction, self.shape)
        _, num_groups, num_positions, num_out = self.left.shape
        num_in = self.right.shape[3]
        lead = (self.num_examples,) if each else ()
        blocks = direction.reshape(*lead, num_groups, num_out, num_in)
        first, second = self.left, self.right
        if num_out > num_in:  # the product over the shorter side, whose rounding grows with its length
            first, second, blocks = second, first, blocks.mT
        parts = [
            _inner(first[part], second[part], blocks[part] if each else blocks)
            for part in chunks(self.num_examples, num_groups * num_positions * max(num_out, num_in))
        ]
        return torch.cat(parts) if parts else self._none()

    def weighted_sum(
        self, weights: Tensor, into: Tensor | None = None, space: Workspace | None = None
    ) -> Tensor:
        """(*shape), as one matrix product per group over all examples and positions."""
        if kernels.serves_total(self.left, self.right, into):
            total = torch.zeros(self.shape, device=self.left.device) if into is None else into
            return kernels.weighted_sum(self.left, self.right, weights, total)
        scaled_left = self.left.shape[-1] <= self.right.shape[-1]
        other = widen(self.right if scaled_left else self.left)
        scale = weights.to(other.dtype).view(-1, 1, 1, 1)
        scaled = (space or Workspace()).scaled(self.left if scaled_left else self.right, scale)
        left, right = (scaled, other) if scaled_left else (other, scaled)
        length = left.shape[0] * left.shape[2]
        run = LONG if left.shape[2] > LONG else length
        if left.shape[1] == 1:
            flat_left, flat_right = left.flatten(0, 2), right.flatten(0, 2)
            if into is not None and into.is_contiguous() and run == length:
                into.view(flat_left.shape[1], flat_right.shape[1]).addmm_(flat_left.T, flat_right)
                return into
            total = product(flat_left.T, flat_right, run)
        else:
            total = product(left.permute(1, 3, 0, 2).flatten(2), right.transpose(0, 1).flatten(1, 2), run)
        total = total.reshape(self.shape)
        return total if into is None else into.add_(total)

    def masked(self, keep: Tensor) -> Outer:
        """Gradients of examples outside `keep` set to zero."""
        return Outer(kept(self.left, keep), kept(self.right, keep), self.shape)

    def part(self, examples: slice) -> Outer:
        """Gradients of a slice of the batch."""
        return Outer(self.left[examples], self.right[examples], self.shape)

    def rounding(self) -> Tensor:
        """(B,): relative to |left| |right|, which bounds the terms by Cauchy and Schwarz."""
        return rounding_of(
            row_norm(self.left) * row_norm(self.right), min(self.left.shape[3], self.right.shape[3])
        )
