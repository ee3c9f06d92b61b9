# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of the positions of each example, block by block, and those that several layers share.

Shapes: B examples, K groups, T positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from clipping.rounding.norms import CHUNK_ELEMENTS, row_norm, widen
from clipping.rounding.products import epsilons, product, product_epsilons, row_sum, sum_epsilons


def _row_blocks(num_positions: int, num_grams: int) -> Iterator[tuple[slice, int]]:
    """Slices of the rows of symmetric (T, T) matrices, each with the column at which its own diagonal begins.

    Columns to the right of a slice repeat those below it, so they are never computed: 5/8 of a matrix in four
    slices. `num_grams` such matrices in one slice stay under CHUNK_ELEMENTS.
    """
    wanted = 4 if num_positions >= 128 else 2 if num_positions >= 64 else 1
    rows = max(1, min(-(-num_positions // wanted), CHUNK_ELEMENTS // max(1, num_grams * num_positions)))
    for start in range(0, num_positions, rows):
        yield slice(start, min(start + rows, num_positions)), start


class Extent(NamedTuple):
    """What bounds the error of Gram matrices: traces, Frobenius norms, and epsilons of an inner product."""

    trace: Tensor
    norm: Tensor
    epsilons: float


class Gram(NamedTuple):
    """The lower blocks of the Gram matrices of (B, K, T, D), the sums (B,) of their diagonals and their norms."""

    blocks: tuple[Tensor, ...]
    trace: Tensor
    norm: Tensor

    def part(self, examples: slice) -> Gram:
        """Those of a slice of the batch."""
        return Gram(tuple(x[examples] for x in self.blocks), self.trace[examples], self.norm[examples])


def _gram_block(values: Tensor, rows: slice) -> Tensor:
    return product(values[:, :, rows], values[:, :, : rows.stop].mT)


def _diagonal(block: Tensor, start: int) -> Tensor:
    return block[:, :, :, start:].diagonal(dim1=2, dim2=3).sum((1, 2))


def _norm(block: Tensor, start: int) -> Tensor:
    # What is left of the diagonal stands for its mirror image too; the rest is counted twice, which only adds.
    return row_norm(block) * (math.sqrt(2) if start else 1.0)


def _sizes(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The trace and the norm (B,) of matrices, given those of their blocks."""
    traces, norms = zip(*parts, strict=True)
    return torch.stack(traces).sum(0), torch.linalg.vector_norm(torch.stack(norms), dim=0)


def _gram(values: Tensor) -> Gram:
    pairs = [(_gram_block(values, rows), start) for rows, start in _row_blocks(values.shape[2], 1)]
    sizes = _sizes([(_diagonal(*pair), _norm(*pair)) for pair in pairs])
    return Gram(tuple(block for block, _ in pairs), *sizes)


def _block_product(left: Tensor, right: Tensor, start: int) -> Tensor:
    terms = left.mul_(right)
    total = row_sum(terms)
    return total + row_sum(terms[:, :, :, :start]) if start else total


def bounded(total: Tensor, left: Extent, right: Extent, terms: float) -> tuple[Tensor, Tensor]:
    """(B,) no less than the sum of the product of two Gram matrices, which came out as `total`, and the margin.

    Guarantees
    ----------
    With u and v the epsilons of both Grams A and G as computed, |error of A_ts| <= u |a_t| |a_s|, so the error of
    <A, G> is at most u tr A |G| + v |A| tr G + u v tr A tr G by Cauchy and Schwarz, and that of the sum `terms`
    epsilons of |A| |G|; |.| are Frobenius norms of the Grams as computed. Where positions do not cancel they are
    far below the traces. Source: own derivation (test_guarantee_tails_that_vanish_beside_ones_are_measured).
    -inf plus a finite margin would come out as a small norm: a total that is not finite is inf.
    """
    mine, other = (epsilons(x.epsilons, total.dtype) * x.trace for x in (left, right))
    margin = mine * right.norm + other * left.norm + mine * other
    margin = margin + epsilons(terms, total.dtype) * left.norm * right.norm
    return torch.where(torch.isfinite(total), total.clamp_min(0) + margin, torch.inf), margin


def gram_product(
    left: Tensor, right: Tensor, known: Gram | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(B,) sum of the product of both Gram matrices, `bounded`, and their traces; `known` is the Gram of `right`."""
    totals: list[Tensor] = []
    lefts: list[tuple[Tensor, Tensor]] = []
    rights: list[tuple[Tensor, Tensor]] = []
    most = 0
    num_grams = 1 if known is not None else 2 * left.shape[1]
    for index, (rows, start) in enumerate(_row_blocks(left.shape[2], num_grams)):
        mine = _gram_block(left, rows)
        other = _gram_block(right, rows) if known is None else known.blocks[index]
        lefts.append((_diagonal(mine, start), _norm(mine, start)))
        if known is None:
            rights.append((_diagonal(other, start), _norm(other, start)))
        most = max(most, mine.shape[1:].numel())
        totals.append(_block_product(mine, other, start))
    first = Extent(*_sizes(lefts), product_epsilons(left.shape[3]))
    sizes = _sizes(rights) if known is None else (known.trace, known.norm)
    second = Extent(*sizes, product_epsilons(right.shape[3]))
    total = bounded(torch.stack(totals).sum(0), first, second, sum_epsilons(most) + len(totals))
    return total, (first.trace, second.trace)


LARGEST_SCRATCH = 1 << 24
"""Elements above which scratch is allocated afresh (64 MiB in float32)."""


class Workspace:
    """What the layers of one step can share: the Gram of the input seen last, and scratch for scaled factors.

    Queries, keys and values read one input. Scratch is used again by the next layer while it is in the cache;
    fresh memory would be paged in at every layer.
    """

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._gram: Gram | None = None
        self._version = 0
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def forget(self) -> None:
        """Let go of the input seen last."""
        self._values = self._gram = None

    def scaled(self, values: Tensor, scale: Tensor) -> Tensor:
        """`values` times `scale` in the dtype of `scale`, that in which they are summed, valid until the next call."""
        dtype = scale.dtype
        size, key = values.numel(), (dtype, values.device)
        known = self._scratch.get(key)
        if known is None or known.numel() < size:
            known = torch.empty(size, dtype=dtype, device=values.device)
            if size <= LARGEST_SCRATCH:
                self._scratch[key] = known
        return torch.mul(values, scale, out=known[:size].view(values.shape))

    def gram(self, values: Tensor) -> Gram | None:
        """The Gram of `values` (B, K, T, D), computed where it was not the last; None where it is too large."""
        num_examples, num_groups, num_positions, _ = values.shape
        if num_examples * num_groups * num_positions * num_positions > CHUNK_ELEMENTS:
            return None
        known = self._values
        if (
            self._gram is None
            or known is None
            or self._version != values._version
            or not _same(known, values)
        ):
            self._gram = _gram(widen(values))
        self._version = values._version
        self._values = values  # kept alive: its address cannot become another tensor's
        return self._gram


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors show the same memory."""
    return (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.dtype == second.dtype
        and first.device == second.device
    )
