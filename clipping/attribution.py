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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from clipping.errors import MixesExamples
from clipping.grads import SampleGrads
from clipping.row_graph import Found, walk
from clipping.row_maps import BLOCKS, CYCLES, RowMap, joined
from clipping.tap import Call, Point, Record

EACH = "each"
"""The rows of every batch are asked for."""

MIXED = -2
"""The owner of a row that several examples reach."""


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
    """The maps of rows to examples of the points that are alive, and the orders that were found."""

    def __init__(self) -> None:
        self.maps: WeakKeyDictionary[Point, RowMap] = WeakKeyDictionary()
        self.asking = False
        self._rows: WeakKeyDictionary[Point, int] = WeakKeyDictionary()
        self._orders: dict[Key, _Order] = {}
        self._proven: set[tuple[Key, int]] = set()

    def doubt(self) -> None:
        """Ask again at the next backward."""
        self._proven.clear()

    def note(self, point: Point, num_rows: int) -> None:
        """A point of so many rows was made."""
        self._rows[point] = num_rows

    def attribute(self, gates: Sequence[Any], num_examples: int) -> None:
        """Find the example of each row wherever rows are not the examples.

        `gates` are tensors or edges of a graph whose first dimension holds the examples, the losses say. The graph stays
        usable.
        """
        odd = [
            p for p, rows in self._rows.items() if self._is_odd(p, rows, num_examples) and p not in self.maps
        ]
        if not odd or num_examples == 0:
            return
        found = walk(gates)
        asked: dict[Point, Found] = {}
        for point in odd:
            place = found.get(point)
            if place is None:
                continue
            key = _key(point)
            order, rows = self._orders.get(key), self._rows[point]
            if num_examples == 1:
                self.maps[point] = RowMap(1, rows, BLOCKS)
            elif (
                order is None
                or place.dynamic
                or (key, place.path) not in self._proven
                or not order.fits(rows, num_examples)
            ):
                asked[point] = place
            else:
                self.maps[point] = order.map(place, num_examples)
        if asked:
            owners = self._ask(asked, gates, [_sent_back(gate) for gate in gates], num_examples)
            for point, owner in owners.items():
                self._learn(point, asked[point], owner, num_examples)

    def rows(self, record: Record, point: Point, num_rows: int, shape: Sequence[int] = ()) -> RowMap | None:
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

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        self.asking = True
        try:
            yield
        finally:
            self.asking = False

    def has_odd(self, num_examples: int) -> bool:
        """Whether some rows are not the examples, and nobody has asked whose they are."""
        return any(self._is_odd(p, n, num_examples) and p not in self.maps for p, n in self._rows.items())

    def _is_odd(self, point: Point, num_rows: int, num_examples: int) -> bool:
        order = self._orders.get(_key(point))
        return num_rows != num_examples or (order is not None and order.is_always_asked)

    def _ask(
        self, asked: Mapping[Point, Found], gates: Sequence[Any], grads: Sequence[Tensor], num_examples: int
    ) -> dict[Point, Tensor]:
        """The owner of each row of each point, -1 where nothing is sent back; MIXED where several reach it.

        (N,), or (N, L) where the point has tensors of three or more dimensions, the first two of which these are.
        """
        edges = [edge for place in asked.values() for edge in place.edges]
        owners: dict[Point, Tensor] = {}
        numbers = torch.arange(num_examples)
        for bit in range((num_examples - 1).bit_length()):
            half = (numbers >> bit) & 1 == 1
            reached = [self._reached(asked, edges, gates, grads, chosen) for chosen in (half, ~half)]
            for point, ones, zeros in zip(asked, *reached, strict=True):
                known = owners.get(point)
                known = torch.full(ones.shape, -1, device=ones.device) if known is None else known
                found = torch.where(ones | zeros, known.clamp_min(0) | (ones.long() << bit), known)
                owners[point] = torch.where((ones & zeros) | (known == MIXED), MIXED, found)
        return owners

    def _reached(
        self,
        asked: Mapping[Point, Found],
        edges: Sequence[GradientEdge],
        gates: Sequence[Any],
        grads: Sequence[Tensor],
        chosen: Tensor,
    ) -> list[Tensor]:
        sent = []
        for grad in grads:
            mask = chosen.to(grad.device).view(-1, *(1,) * (grad.dim() - 1))
            sent.append(torch.where(mask, grad, torch.zeros_like(grad)))
        with self._quiet():
            found = list(torch.autograd.grad(gates, edges, sent, retain_graph=True, allow_unused=True))
        rows = []
        for place in asked.values():
            mine, found = found[: len(place.edges)], found[len(place.edges) :]
            rows.append(_nonzero(place, mine))
        return rows

    def _learn(self, point: Point, place: Found, owners: Tensor, num_examples: int) -> None:
        key, known = _key(point), self._orders.get(_key(point))
        depth = 1
        if owners.dim() > 1:
            alone = _in_one(owners)
            depth = 2 if bool((alone == MIXED).any()) else 1
            owners = owners.flatten() if depth == 2 else alone
        if bool((owners == MIXED).any()) or (depth == 2 and not _can_be_deep(point)):
            raise MixesExamples(
                f"expected each row of {_name(point)!r} to belong to one example; got rows that the losses of several "
                "reach; look for attention across the batch, statistics of the batch, and losses that compare examples"
            )
        orders = [] if place.dynamic else _orders(owners, num_examples)
        if len(orders) == 1 and known in (None, _Order(orders[0], depth)):
            order = self._orders[key] = _Order(orders[0], depth)
            self._proven.add((key, place.path))
            self.maps[point] = order.map(place, num_examples)
            return
        if not orders:
            self._orders[key] = _Order(EACH, depth)
        self.maps[point] = RowMap.of_owners(owners, num_examples, depth)


def _sent_back(gate: Any) -> Tensor:
    """A gradient (B, ...) of a gate, the same for each example; not ones, which some functions send nothing back for."""
    if isinstance(gate, Tensor):
        shape, dtype, device = gate.shape, gate.dtype, gate.device
    else:
        known = gate.node._input_metadata[gate.output_nr]
        shape, dtype, device = known.shape, known.dtype, known.device
    row = torch.linspace(1, 2, math.prod(shape[1:]), dtype=dtype, device=device)
    return row.view(shape[1:]).expand(shape)


def _in_one(owners: Tensor) -> Tensor:
    """(N,) owners from (N, L)."""
    highest = owners.amax(1)
    others = torch.where(owners == -1, highest.unsqueeze(1), owners)
    return torch.where((others == highest.unsqueeze(1)).all(1), highest, MIXED)


def _can_be_deep(point: Point) -> bool:
    return isinstance(point, Call) and point.dims is None and point.spread is None


def _nonzero(place: Found, grads: Sequence[Tensor | None]) -> Tensor:
    shape = place.rows_shape
    device = next((g.device for g in grads if g is not None), None)
    reached = torch.zeros(shape, dtype=torch.bool, device=device)
    for grad, dim in zip(grads, place.dims, strict=True):
        if grad is not None:
            rows = grad.movedim(dim, 0)
            # Zero times the infinity of a broken example is NaN, and tells nothing.
            reached |= ((rows != 0) & torch.isfinite(rows)).reshape(*shape, -1).any(-1)
    return reached


def regrouped(found: Mapping[str, SampleGrads], rows: RowMap | None) -> dict[str, SampleGrads]:
    """The gradients of examples from those of their rows."""
    if rows is None:
        return dict(found)
    return {name: joined(grads, rows) for name, grads in found.items() if rows.num_most}


def rows_of(call: Call, outputs: Sequence[Tensor], batch_dim: int) -> int:
    """How many rows a call has: the examples, where it is an ordinary one."""
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
