# SPDX-License-Identifier: Apache-2.0
"""Rows that are not the examples: which example each row of a layer belongs to, and gradients joined accordingly.

Augmentations, frames, choices, windows and positions are folded into the batch before a layer, or some rows are
picked. The layer's rule treats each row as an example; what it returns for the rows of one example is then joined.

Shapes: N rows, B examples, M rows of an example (the most, where they have different numbers).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipping.gradients.convolved import Convolved
from clipping.gradients.dense import Dense
from clipping.gradients.outer import Outer
from clipping.gradients.routed import Routed
from clipping.gradients.rows import Rows
from clipping.gradients.sample_grads import SampleGrads
from clipping.gradients.sum import Sum
from clipping.rounding.norms import widen

BLOCKS = "blocks"
"""Row n belongs to example n // M."""

CYCLES = "cycles"
"""Row n belongs to example n % B."""


@dataclass(frozen=True, slots=True, eq=False)
class RowMap:
    """To which of `num_examples` examples each of `num_rows` rows belongs.

    `order` is BLOCKS, CYCLES, or the rows (B, M) of each example, `num_rows` standing for none. The rows are those of the
    first `depth` dimensions taken together: where a layer sees (T, B, D), each position of each example is a row.
    """

    num_examples: int
    num_rows: int
    order: str | Tensor
    depth: int = 1

    @staticmethod
    def of_owners(owners: Tensor, num_examples: int, depth: int = 1) -> RowMap:
        """That of rows with these owners (N,), -1 for rows of nobody."""
        num_rows = len(owners)
        counts = torch.bincount(owners[owners >= 0], minlength=num_examples)
        most = int(counts.max()) if num_rows else 0
        picked = (owners >= 0).nonzero().squeeze(1)
        picked = picked[owners[picked].argsort(stable=True)]
        first = counts.cumsum(0) - counts
        rows = torch.full((num_examples, most), num_rows, dtype=torch.long, device=owners.device)
        mine = owners[picked]
        rows[mine, torch.arange(len(picked), device=owners.device) - first[mine]] = picked
        return RowMap(num_examples, num_rows, rows, depth)

    @property
    def num_most(self) -> int:
        """M."""
        if isinstance(self.order, Tensor):
            return self.order.shape[1]
        return self.num_rows // max(1, self.num_examples)

    def owners(self, device: torch.device) -> Tensor:
        """(N,): the example of each row, -1 where it has none."""
        rows = torch.arange(self.num_rows, device=device)
        if self.order == BLOCKS:
            return rows // max(1, self.num_rows // self.num_examples)
        if self.order == CYCLES:
            return rows % self.num_examples
        assert isinstance(self.order, Tensor)
        found = torch.full((self.num_rows + 1,), -1, dtype=torch.long, device=device)
        examples = torch.arange(self.num_examples, device=device).unsqueeze(1)
        order = self.order.to(device)
        found[order.flatten()] = examples.expand_as(order).flatten()
        return found[:-1]

    def apart(self, values: Tensor) -> Tensor:
        """(B, M, ...) from (N, ...); rows that an example does not have are zeros."""
        if self.order == BLOCKS:
            return values.unflatten(0, (self.num_examples, -1))
        if self.order == CYCLES:
            return values.unflatten(0, (-1, self.num_examples)).transpose(0, 1)
        assert isinstance(self.order, Tensor)
        padded = torch.cat((values, values.new_zeros(1, *values.shape[1:])))
        return padded[self.order.to(values.device)]

    def flat(self, value: object) -> object:
        """A tensor with its rows in one dimension."""
        return value.flatten(0, self.depth - 1) if isinstance(value, Tensor) and self.depth > 1 else value

    def summed(self, values: Tensor) -> Tensor:
        """(B, ...): the sum over the rows of each example."""
        return self.apart(widen(values)).sum(1)


def joined(grads: SampleGrads, rows: RowMap) -> SampleGrads:
    """The gradients of B examples from those of N rows, each taken for an example."""
    match grads:
        case Dense():
            return Dense(rows.summed(grads.values))
        case Outer():
            factors = (grads.left, grads.right)
            left, right = (_positions(x.transpose(1, 2), rows).transpose(1, 2) for x in factors)
            return Outer(left, right, grads.shape)
        case Rows():
            values = _positions(grads.values, rows)
            return Rows(_positions(grads.indices, rows), values, grads.num_rows)
        case Routed():
            experts, left, right = (_positions(x, rows) for x in (grads.experts, grads.left, grads.right))
            return Routed(experts, left, right, grads.num_experts)
        case Convolved():
            values, grad = (_repeated(x, grads.repeats, rows) for x in (grads.values, grads.grad))
            repeats = len(values) // rows.num_examples
            return Convolved(values, grad, grads.shape, grads.geometry, repeats)
        case Sum():
            return Sum(tuple(joined(part, rows) for part in grads.parts))
        case _:
            return Dense(rows.summed(grads.dense()))


def _positions(values: Tensor, rows: RowMap) -> Tensor:
    """(B, M * T, ...) from (N, T, ...)."""
    return rows.apart(values).flatten(1, 2)


def _repeated(values: Tensor, repeats: int, rows: RowMap) -> Tensor:
    """(B * M * R, ...) from (N * R, ...)."""
    return rows.apart(values.unflatten(0, (-1, repeats))).flatten(0, 2)
