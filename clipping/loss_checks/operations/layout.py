# SPDX-License-Identifier: Apache-2.0
"""Where the examples are in a tensor, through views, permutations and selections.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Dimension `dim`, of size outer * B * inner, holds the examples: index n belongs to (n // inner) % B.

    `order`, where the rows were rearranged, are the numbers of the examples in the order of the rows (int64).
    """

    dim: int
    outer: int = 1
    inner: int = 1
    order: bytes | None = None

    def at(self, dim: int) -> Layout:
        """The same in another dimension."""
        return self if dim == self.dim else self._replace(dim=dim)

    def size(self, num_examples: int) -> int:
        """That of the dimension."""
        return self.outer * num_examples * self.inner

    def owners(self, num_examples: int) -> np.ndarray:
        """The example that each index of the dimension belongs to."""
        rows = np.arange(self.size(num_examples)) // self.inner % num_examples
        return rows if self.order is None else np.frombuffer(self.order, dtype=np.int64)[rows]


def viewed(layout: Layout, num_examples: int, before: Shape, after: Shape) -> Layout | None:
    """The layout after a reshape, None where the examples are then spread over several dimensions."""
    if before == after:
        return layout
    outside = prod(before[: layout.dim]) * layout.outer
    inside = layout.inner * prod(before[layout.dim + 1 :])
    left = 1
    for dim, size in enumerate(after):
        right = prod(after[dim + 1 :])
        if left and right and not (outside % left or inside % right):
            found = Layout(dim, outside // left, inside // right, layout.order)
            if found.size(num_examples) == size:
                return found
        left *= size
    return None


def permuted(layout: Layout, dims: Sequence[int]) -> Layout:
    """The layout after `permute(dims)`."""
    return layout.at([d % len(dims) for d in dims].index(layout.dim))


def reduced(layout: Layout, dims: Sequence[int], keepdim: bool) -> Layout:
    """The layout after a reduction over other dimensions than that of the examples."""
    return layout if keepdim else layout.at(layout.dim - sum(d < layout.dim for d in dims))


def sliced(layout: Layout, num_examples: int, start: int, length: int) -> Layout | None:
    """The layout of indices start ... start + length - 1, None where they are not as many of each example."""
    block = num_examples * layout.inner
    if start % block or length % block or not length:
        return None
    return layout._replace(outer=length // block)


def selected(layout: Layout, num_examples: int, index: Tensor) -> Layout | None:
    """The layout of the rows `index`, None unless they are as many of each example and in a known order."""
    rows = torch.arange(layout.size(num_examples), device="cpu")
    chosen = rows[index.detach().cpu().long()].numpy()
    owners = layout.owners(num_examples)[chosen]
    times, rest = divmod(len(owners), num_examples)
    if rest or not times:
        return None
    for found in (Layout(layout.dim, times), Layout(layout.dim, 1, times)):
        if np.array_equal(owners, found.owners(num_examples)):
            return found
    if times == 1 and np.array_equal(np.sort(owners), np.arange(num_examples)):
        return Layout(layout.dim, order=owners.astype(np.int64).tobytes())
    return None
