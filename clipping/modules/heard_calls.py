# SPDX-License-Identifier: Apache-2.0
"""What one run of a model lets its layers see: the inputs of each, and the gradients of their outputs, row by row.

A row is kept as three numbers, so that two runs can be compared without holding the activations of both.

Shapes: N rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipping.modules.layers import Layer
from clipping.reruns.nested_values import flatten, unflatten
from clipping.rounding.norms import widen

Key = tuple[str, str, int, int]
"""("input", "gradient" or "output", the layer's name, number of the call, number of the tensor)."""

FOLDED = -1
"""The reading of a first dimension of k N rows, in whatever order; the others are dimensions of N."""


class Print(NamedTuple):
    """The shape of a tensor, and by reading three numbers for each row, (N, 3) or (k N, 3)."""

    shape: tuple[int, ...]
    rows: dict[int, Tensor]


def readings(shape: Sequence[int], num_rows: int) -> list[int]:
    """Where the rows may be in a tensor of that shape."""
    found = [dim for dim, size in enumerate(shape[:3]) if size == num_rows]
    if shape and shape[0] > num_rows and shape[0] % num_rows == 0:
        found.append(FOLDED)
    return found


def size_of(shape: Sequence[int], reading: int) -> int:
    """The size of the dimension that a reading is about; 0 where there is none."""
    dim = max(reading, 0)
    return shape[dim] if dim < len(shape) else 0


class Ear:
    """Hears one run on `num_rows` rows. `scales` (N,) multiply the rows that embeddings give out.

    `longer` are the shapes in a run of more rows, where they are known: an embedding whose output does not grow serves all
    examples.
    """

    def __init__(
        self,
        num_rows: int,
        scales: Tensor | None = None,
        longer: Mapping[Key, tuple[int, ...]] | None = None,
    ) -> None:
        self.prints: dict[Key, Print] = {}
        self.shapes: dict[Key, tuple[int, ...]] = {}
        self.anchor = torch.zeros((), requires_grad=True, device="cpu")
        self._num_rows = num_rows
        self._scales = scales
        self._longer = longer
        self._calls: Counter[str] = Counter()
        self._weights: dict[Any, Tensor] = {}

    def __call__(self, layer: Layer, args: Any, kwargs: Any, outputs: object) -> object:
        """A layer was called: note its inputs, and hand out outputs whose gradients will be heard."""
        number = self._calls[layer.name]
        again = torch._C._current_graph_task_id() != -1  # a checkpoint runs a second time
        if not again:
            self._calls[layer.name] += 1
            for place, value in enumerate(flatten((args, dict(kwargs)))[0]):
                if isinstance(value, Tensor):
                    self.note(("input", layer.name, number, place), value)
        leaves, structure = flatten(outputs)
        places = [i for i, x in enumerate(leaves) if _is_floating(x)]
        if not places:
            return None
        given = [self._scaled(layer, number, leaves[i]) for i in places]
        key = None if again else (layer.name, number)
        heard = _Heard.apply(self, key, self.anchor, *given)
        for number_out, x in enumerate(heard if isinstance(heard, tuple) else (heard,)):
            leaves[places[number_out]] = x
            if not again:
                self.shapes["gradient", layer.name, number, number_out] = tuple(x.shape)
        return unflatten(leaves, structure)

    def _scaled(self, layer: Layer, number: int, value: Any) -> Tensor:
        if self._scales is None or not isinstance(layer.module, nn.Embedding):
            return value
        if value.shape[0] != self._num_rows:
            return value
        key = ("gradient", layer.name, number, 0)
        if self._longer is not None and self._longer.get(key, value.shape)[0] == self._num_rows:
            return value
        return value * self._scales.to(value).reshape([-1, *[1] * (value.dim() - 1)])

    def note(self, key: Key, value: Tensor) -> None:
        """Keep the rows of a tensor."""
        shape = tuple(value.shape)
        self.shapes[key] = shape
        found = readings(shape, self._num_rows)
        if found and value.numel():
            rows = {reading: self._printed(value.detach(), reading) for reading in found}
            self.prints[key] = Print(shape, rows)

    def forget_gradients(self) -> None:
        """Some were not heard: compare none."""
        self.prints = {key: found for key, found in self.prints.items() if key[0] != "gradient"}

    def _printed(self, value: Tensor, reading: int) -> Tensor:
        if value.is_complex():
            value = torch.view_as_real(value)
        rows = value.movedim(max(reading, 0), 0)
        rows = rows.reshape(len(rows), -1)
        rows = widen(rows) if rows.is_floating_point() else rows.to(torch.float32)
        return torch.cat([torch.linalg.vector_norm(rows, dim=1, keepdim=True), rows @ self._weight(rows)], 1)

    def _weight(self, rows: Tensor) -> Tensor:
        key = rows.shape[1], rows.dtype, rows.device
        if key not in self._weights:
            places = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64)[:, None]
            steps = torch.tensor([2.0, 3.0], device=rows.device, dtype=torch.float64).sqrt()
            self._weights[key] = ((places * steps).frac() - 0.5).to(rows.dtype)
        return self._weights[key]


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


class _Heard(torch.autograd.Function):
    """Identity whose backward notes the gradients."""

    @staticmethod
    def forward(ctx, ear: Ear, key: tuple[str, int] | None, anchor: Tensor, *tensors: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Hand on the outputs, detached so that they may be changed in place."""
        ctx.set_materialize_grads(False)
        ctx.ear, ctx.key = ear, key
        outputs = tuple(x.detach() for x in tensors)
        return outputs[0] if len(tensors) == 1 else outputs

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Note the gradients, and hand them on."""
        for place, grad in enumerate(grads):
            if grad is not None and ctx.key is not None:
                ctx.ear.note(("gradient", *ctx.key, place), grad)
        return (None, None, None, *grads)


def disagreeing(first: Ear, second: Ear, stay: Tensor, tolerance: float) -> list[Key]:
    """The tensors in which the rows that stayed are others, however their rows are read."""
    keys, flags = [], []
    for key, known in first.prints.items():
        other = second.prints.get(key)
        if other is None or other.shape != known.shape:
            continue  # cut to the longest example, say: not comparable
        agree = [
            (_match if reading == FOLDED else _agree)(rows, other.rows[reading], stay, tolerance)
            for reading, rows in known.rows.items()
        ]
        keys.append(key)
        flags.append(torch.stack(agree).any().cpu())
    return (
        [key for key, same in zip(keys, torch.stack(flags).tolist(), strict=True) if not same]
        if flags
        else []
    )


def _agree(first: Tensor, second: Tensor, stay: Tensor, tolerance: float) -> Tensor:
    stay = stay.to(first.device)
    first, second = first[stay], second[stay]
    allowed = tolerance * first[:, :1] + torch.finfo(first.dtype).tiny
    return (
        ((first - second).abs() <= allowed) | ((first == second) | (first.isnan() & second.isnan()))
    ).all()


def _match(first: Tensor, second: Tensor, stay: Tensor, tolerance: float) -> Tensor:
    """Whether as many rows of `first` are among those of `second` as the examples that stay have."""
    place = torch.searchsorted(second[:, 1].sort().values.contiguous(), first[:, 1].contiguous())
    order = second[:, 1].argsort()
    allowed = tolerance * first[:, :1] + torch.finfo(first.dtype).tiny
    found = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    for near in (place.clamp(max=len(second) - 1), (place - 1).clamp(min=0)):
        other = second[order[near]]
        found |= (((first - other).abs() <= allowed) | (first == other)).all(1)
    return found.sum() * len(stay) >= len(first) * stay.sum()


def follows(ear: Ear, key: Key, shapes: Mapping[Key, tuple[int, ...]]) -> bool:
    """Whether a dimension in which the rows were looked for grows with the rows."""
    if key not in shapes:
        return True
    known = ear.prints[key]
    return any(size_of(known.shape, x) != size_of(shapes[key], x) for x in known.rows)
