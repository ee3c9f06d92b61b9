# SPDX-License-Identifier: Apache-2.0
"""Backwards that ask the losses whose the rows of layers are, and keep no gradient.

Shapes: N rows, B examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from clipping.recording.row_graph import Found
from clipping.recording.tap import Point

MIXED = -2
"""The owner of a row that several examples reach."""


class Question:
    """Backwards that ask whose the rows of some points are: all of the graph's above `anchor`, or as far as needed."""

    def __init__(self, asked: Mapping[Point, Found], gates: Sequence[Any], anchor: Tensor | None) -> None:
        self._asked = asked
        self._gates = gates
        self._anchor = anchor
        self._seen: dict[Point, Tensor] = {}

    def see(self, points: Sequence[Point], grads: Sequence[Tensor | None]) -> None:
        """Look which rows are reached, and keep no gradient."""
        for point in points:
            place = self._asked.get(point)
            if place is not None and point not in self._seen:
                self._seen[point] = _reached(place, grads)

    def owners(self, num_examples: int) -> dict[Point, Tensor]:
        """The owner of each row of each point, -1 where nothing is sent back; MIXED where several reach it.

        (N,), or (N, L) where the point has tensors of three or more dimensions, the first two of which these are.
        """
        grads = [_sent_back(gate) for gate in self._gates]
        numbers = torch.arange(num_examples, device="cpu")
        count = (num_examples - 1).bit_length()
        owners: dict[Point, Tensor] = {}
        times: dict[Point, Tensor] = {}
        for bit in range(count):
            half = (numbers >> bit) & 1 == 1
            ones, zeros = self._ask(grads, half), self._ask(grads, ~half)
            for point in self._asked:
                one, zero = ones[point], zeros[point]
                known = owners.get(point, torch.zeros_like(one, dtype=torch.long))
                owners[point] = torch.where(
                    one & zero, MIXED, torch.where(known == MIXED, known, known | one.long() << bit)
                )
                times[point] = times.get(point, 0) + (one | zero).long()
        for point, owner in owners.items():
            # One that is reached in one cut is reached in all of them, or numbers vanish on the way.
            owners[point] = torch.where(
                times[point] == 0, -1, torch.where(times[point] < count, MIXED, owner)
            )
        return owners

    def _ask(self, grads: Sequence[Tensor], chosen: Tensor) -> dict[Point, Tensor]:
        sent = []
        for grad in grads:
            mask = chosen.to(grad.device).view(-1, *(1,) * (grad.dim() - 1))
            sent.append(torch.where(mask, grad, torch.zeros_like(grad)))
        self._seen = {}
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        if self._anchor is not None:
            torch.autograd.grad(self._gates, [self._anchor], sent, **options)
        else:
            edges = [
                GradientEdge(place.node, i)
                for place in self._asked.values()
                for i in range(len(place.shapes))
            ]
            found = list(torch.autograd.grad(self._gates, edges, sent, **options))
            for point, place in self._asked.items():
                self._seen[point] = _reached(place, found[: len(place.shapes)])
                found = found[len(place.shapes) :]
        return {
            p: self._seen[p] if p in self._seen else _reached(place, ()) for p, place in self._asked.items()
        }


def _reached(place: Found, grads: Sequence[Tensor | None]) -> Tensor:
    """(N,) or (N, L): the rows that gradients of a point's outputs are not zero in."""
    shape = place.rows_shape
    device = next((g.device for g in grads if g is not None), None)
    reached = torch.zeros(shape, dtype=torch.bool, device=device)
    for grad, dim in zip(grads, place.dims, strict=False):
        if grad is not None:
            rows = grad.movedim(dim, 0)
            # Zero times the infinity of a broken example is NaN, and tells nothing.
            reached |= ((rows != 0) & torch.isfinite(rows)).reshape(*shape, -1).any(-1)
    return reached


def _sent_back(gate: Any) -> Tensor:
    """A gradient (B, ...) of a gate, the same for each example; not ones, which some functions send nothing back for."""
    if isinstance(gate, Tensor):
        shape, dtype, device = gate.shape, gate.dtype, gate.device
    else:
        known = gate.node._input_metadata[gate.output_nr]
        shape, dtype, device = known.shape, known.dtype, known.device
    row = torch.linspace(1, 2, math.prod(shape[1:]), dtype=dtype, device=device)
    return row.view(shape[1:]).expand(shape)
