# SPDX-License-Identifier: Apache-2.0
"""Which example each row of a layer belongs to, where rows are not the examples: asked of the losses, not of shapes.

The gradient of the losses of half of the examples is sent back, and of the other half, for halves that tell every two
examples apart (2 log2 B backwards that form nothing). A row that is reached belongs to the examples of that half; a row
that both halves of one cut reach belongs to nobody alone, and is refused. What is found holds for this backward, whatever
was picked or permuted by the data.

Where it is one of two plain orders (blocks, cycles) and nothing between the layer and the losses depends on more than
shapes, later batches of the same operations are taken to have the same order, until `doubt` asks again.

Shapes: N rows, B examples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from clipping.errors import MixesExamples
from clipping.gradients.joined_rows import BLOCKS, CYCLES, RowMap, joined
from clipping.gradients.sample_grads import SampleGrads
from clipping.recording.row_graph import Found, walk
from clipping.recording.row_questions import MIXED, Question
from clipping.recording.tap import Call, Point

EACH = "each"
"""The rows of every batch are asked for."""

ENOUGH = 2
"""Times that a point is asked which nothing is sent back to: an adapter begins with zeros behind it."""


class Counting(Protocol):
    """What knows how many examples a backward is of, None before the first layer told."""

    num_examples: int | None


class Key(NamedTuple):
    """The points that are taken to have the same order of rows: calls of a layer, or meetings of the same values."""

    name: str
    operation: str
    num_dims: int


class _Order(NamedTuple):
    """The order of a point's rows, those of its first `depth` dimensions."""

    order: str
    depth: int

    @property
    def is_always_asked(self) -> bool:
        """Whether a point with as many rows as there are examples is no ordinary one."""
        return self.order == EACH or self.depth > 1

    def fits(self, num_rows: int, num_examples: int) -> bool:
        """Whether the rows can be in this order."""
        return self.order != EACH and (self.depth > 1 or num_rows % num_examples == 0)

    def map(self, place: Found, num_examples: int) -> RowMap:
        """The map of the point."""
        num_rows = math.prod(place.rows_shape[: self.depth]) if self.depth > 1 else place.rows_shape[0]
        return RowMap(num_examples, num_rows, self.order, self.depth)


class Attribution:
    """The maps of rows to examples of the points that are alive, and the orders that were found.

    The nodes of all points stand on `anchor`.
    """

    def __init__(self, anchor: Tensor) -> None:
        self.maps: WeakKeyDictionary[Point, RowMap] = WeakKeyDictionary()
        self._anchor = anchor
        self._rows: WeakKeyDictionary[Point, int] = WeakKeyDictionary()
        self._orders: dict[Key, _Order] = {}
        self._proven: set[tuple[Key, int]] = set()
        self._looked: Counter[Key] = Counter()
        self._question: Question | None = None
        self.asking = False
        """Whether a backward runs that only asks whose rows are; it delivers nothing."""

    def doubt(self) -> None:
        """Ask again at the next backward."""
        self._looked.clear()
        self._proven.clear()

    def note(self, point: Point, num_rows: int) -> None:
        """A point of so many rows was made."""
        self._rows[point] = num_rows

    def see(self, points: Sequence[Point], grads: Sequence[Tensor | None]) -> None:
        """The gradients of the outputs of points, in a backward that asks."""
        if self._question is not None:
            self._question.see(points, grads)

    def is_open(self, num_examples: int, turn: object) -> bool:
        """Whether it is to be asked whose the rows of some point of this `turn` are."""
        points = ((p, n) for p, n in self._rows.items() if p.origin.turn is turn and p not in self.maps)
        return any(self._is_odd(p, n, num_examples) or self._is_new(p) for p, n in points)

    def attribute(self, gates: Sequence[Any], num_examples: int, turn: object) -> None:
        """Find the example of each row wherever rows are not the examples, and see that they are elsewhere.

        `gates` are tensors or edges of a graph whose first dimension holds the examples, the losses say. The graph stays
        usable. `turn` is that of the forwards that they may come from. Where a point is new, or `doubt` was raised, all
        are asked for.

        Guarantees
        ----------
        Where it is asked, each row is taken for the example whose loss it alone reaches, whatever the model does with
        rows; rows that several losses reach raise MixesExamples
        (test_guarantee_each_row_is_clipped_with_the_example_that_it_reaches).
        """
        if not num_examples or not self.is_open(num_examples, turn):
            return
        found = {p: place for p, place in walk(gates).items() if p in self._rows and p not in self.maps}
        whole = any(self._is_new(point) for point in found)
        asked: dict[Point, Found] = {}
        for point, place in found.items():
            rows, order = self._rows[point], self._orders.get(_key(point))
            odd = self._is_odd(point, rows, num_examples)
            if num_examples == 1:
                if rows != 1:
                    self.maps[point] = RowMap(1, rows, BLOCKS)
            elif whole or (odd and not self._is_proven(point, place, num_examples)):
                asked[point] = place
            elif odd and order is not None:
                self.maps[point] = order.map(place, num_examples)
        if asked:
            with self._asked(asked, gates, whole) as question:
                owners = question.owners(num_examples)
            for point, owner in owners.items():
                self._learn(point, asked[point], owner, num_examples)

    @contextmanager
    def _asked(self, asked: Mapping[Point, Found], gates: Sequence[Any], whole: bool) -> Iterator[Question]:
        self._question = Question(asked, gates, self._anchor if whole else None)
        self.asking = True
        try:
            yield self._question
        finally:
            self._question, self.asking = None, False

    def _is_new(self, point: Point) -> bool:
        return self._looked[_key(point)] < ENOUGH

    def _is_proven(self, point: Point, place: Found, num_examples: int) -> bool:
        order = self._orders.get(_key(point))
        known = order is not None and order.fits(self._rows[point], num_examples)
        return known and not place.dynamic and (_key(point), place.path) in self._proven

    def _is_odd(self, point: Point, num_rows: int, num_examples: int) -> bool:
        order = self._orders.get(_key(point))
        return num_rows != num_examples or (order is not None and order.is_always_asked)

    def rows(self, record: Counting, point: Point, num_rows: int, shape: Sequence[int] = ()) -> RowMap | None:
        """Whose the `num_rows` rows of a point are in this backward; None where each is an example.

        `shape` is that of its output, where rows may lie in two dimensions.

        Raises ValueError where they are neither the examples nor known to be theirs.
        """
        found = self.maps.get(point)
        rows = math.prod(shape[: found.depth]) if found is not None and found.depth > 1 else num_rows
        if found is not None and found.num_rows == rows:
            if record.num_examples is None:
                record.num_examples = found.num_examples
            if record.num_examples == found.num_examples:
                return found
        if record.num_examples is None:
            record.num_examples = num_rows
        if record.num_examples == num_rows:
            return None
        several = record.num_examples and num_rows % record.num_examples == 0
        shown = f"{num_rows // record.num_examples} rows for each" if several else "another number of rows"
        raise ValueError(
            f"expected one row for each example at {_name(point)!r}, or rows of which the losses tell whose they are; got "
            f"{shown}; give the losses of the examples, one for each (accumulate(losses), or engine.backward(losses)), "
            "keep the examples in the first dimension, (B, K, ...), or call the layer once for each of the K rows"
        )

    def _learn(self, point: Point, place: Found, owners: Tensor, num_examples: int) -> None:
        key, known = _key(point), self._orders.get(_key(point))
        depth = 1
        if owners.dim() > 1:
            alone = _in_one(owners)
            depth = 2 if bool((alone == MIXED).any()) else 1
            owners = owners.flatten() if depth == 2 else alone
        asked = known is not None and known.is_always_asked
        mixed = bool((owners == MIXED).any()) or (depth == 2 and not _can_be_deep(point))
        if mixed or (not asked and depth == 1 and _is_rearranged(owners, num_examples)):
            raise MixesExamples(
                "expected the output or loss of one example to depend on that example alone; got rows of "
                f"{_name(point)!r} that reach another example's, or several; look for BatchNorm-like statistics, attention "
                "across the batch, contrastive or batch-averaged losses, and rows in another order than the examples"
            )
        # A layer behind zeros is asked once more.
        self._looked[key] += ENOUGH if bool((owners >= 0).any()) else 1
        if depth == 1 and not asked and _are_examples(owners, num_examples):
            return
        orders = [] if place.dynamic else _orders(owners, num_examples)
        kept = known is None or (known.order in orders and known.depth == depth)
        if len(orders) == 1 and kept:
            order = self._orders[key] = _Order(orders[0], depth)
            self._proven.add((key, place.path))
            self.maps[point] = order.map(place, num_examples)
            return
        if not orders or not kept:
            self._orders[key] = _Order(EACH, depth)
        self.maps[point] = RowMap.of_owners(owners, num_examples, depth)


def _is_rearranged(owners: Tensor, num_examples: int) -> bool:
    """Whether each row is another example's, in another order than the examples'.

    The losses are then in an order that the rows are not in: a loss may be that of another example.
    """
    owned = owners[owners >= 0]
    once = len(owned.unique()) == len(owned)
    return len(owners) == num_examples and once and not _are_examples(owners, num_examples)


def _are_examples(owners: Tensor, num_examples: int) -> bool:
    """Whether each row that is reached is an example."""
    numbers = torch.arange(num_examples, device=owners.device)
    return len(owners) == num_examples and bool((owners == numbers)[owners >= 0].all())


def _in_one(owners: Tensor) -> Tensor:
    """(N,) owners from (N, L)."""
    highest = owners.amax(1)
    others = torch.where(owners == -1, highest.unsqueeze(1), owners)
    return torch.where((others == highest.unsqueeze(1)).all(1), highest, MIXED)


def _can_be_deep(point: Point) -> bool:
    return isinstance(point, Call) and point.dims is None and point.spread is None


def regrouped(found: Mapping[str, SampleGrads], rows: RowMap | None) -> dict[str, SampleGrads]:
    """The gradients of examples from those of their rows."""
    if rows is None:
        return dict(found)
    return {name: joined(grads, rows) for name, grads in found.items() if rows.num_most}


def rows_of(call: Call, outputs: Sequence[Tensor], batch_dim: int) -> int:
    """How many rows a call has: the examples, where it is an ordinary one."""
    if call.kept is not None:
        return call.kept.num_examples
    if call.fold is not None:
        return call.fold.num_examples
    dim = call.dims.outputs[0] if call.dims is not None else batch_dim if outputs[0].dim() > 2 else 0
    return outputs[0].shape[dim] if dim is not None and outputs[0].dim() > dim else 0


def _orders(owners: Tensor, num_examples: int) -> list[str]:
    """The plain orders that fit."""
    num_rows = len(owners)
    if num_rows == 0 or num_rows % num_examples:
        return []
    rows = torch.arange(num_rows, device=owners.device)
    candidates = {BLOCKS: rows // (num_rows // num_examples), CYCLES: rows % num_examples}
    owned = owners >= 0
    return [order for order, expected in candidates.items() if bool((owners == expected)[owned].all())]


def _name(point: Point) -> str:
    return point.layer.name or "model" if isinstance(point, Call) else point.names[0]


def _key(point: Point) -> Key:
    if isinstance(point, Call):
        return Key(point.layer.name, "", 0)
    return Key(",".join(point.names), point.operation, point.value.dim())
