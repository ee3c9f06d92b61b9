# SPDX-License-Identifier: Apache-2.0
"""Where a shared value first meets the examples: there its gradient still has one row for each of them.

Behind that place autograd sums it, as it must. So the value passes a node there that takes the gradient by rows, and
hands on none. Three ways: broadcast, the value stands once beside all rows and is expanded to one view for each;
aligned, it has the rows already; and any other operation, which is run again to split its gradient.

Shapes: N rows of the result, N = m R where the model was called with R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipping.modules.replay import Origin
from clipping.shared_values.example_free import Operation, tensors_of

_ELEMENTWISE = frozenset(
    "add add_ sub sub_ subtract subtract_ rsub __rsub__ mul mul_ multiply multiply_ div div_ divide true_divide "
    "__rdiv__ __rtruediv__ pow __rpow__ where maximum minimum fmax fmin addcmul addcdiv lerp".split()
)
_ASSIGNMENTS = frozenset(("copy_", "__setitem__"))
_SAVES_NOTHING = _ASSIGNMENTS | frozenset("add add_ sub sub_ subtract subtract_ rsub __rsub__".split())
_PRODUCTS = frozenset("matmul __matmul__ bmm".split())
_JOINS = frozenset("cat concat concatenate".split())
_ATTENTION = "scaled_dot_product_attention"


class Place(NamedTuple):
    """How a shared value meets N rows: `kind` is "broadcast", "aligned" or "other".

    `lead` are the dimensions that a broadcast value lacks in front.
    """

    kind: str
    rows: int
    lead: int = 0


Deliver = Callable[[Sequence["Meeting"], Tensor, Callable[[], Sequence[Tensor]]], None]
"""(meetings, gradient of what they made or were handed as, (N, ...), what makes each one's own gradient of it)."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Meeting:
    """A shared value at one place; `deliver` is called in the backward with its gradient by rows.

    Of a broadcast or other value that is (N, *value's shape), of an aligned one the value's shape, N first. `names` are
    those of the parameters that `sources` have, `operation` the name of that which brings them together.
    """

    place: Place
    value: Tensor
    sources: frozenset[Any]
    names: tuple[str, ...]
    operation: str
    origin: Origin
    deliver: Deliver
    entered: bool = False
    """Whether data entered the value that are not rows of examples, whose gradient then goes on as it is."""


class Met(torch.autograd.Function):
    """A shared value handed to an operation: itself, or one view of it for each row."""

    @staticmethod
    def forward(ctx, meeting: Meeting, anchor: Tensor, value: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Remember the meeting."""
        ctx.set_materialize_grads(False)
        ctx.meetings = (meeting,)
        value, place = value.detach(), meeting.place
        if place.kind != "broadcast":
            return value
        value = value.reshape(*(1,) * place.lead, *value.shape)
        return value.expand(place.rows, *value.shape[1:])

    @staticmethod
    def backward(ctx, grad: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deliver the gradient by rows; hand on none."""
        (meeting,) = ctx.meetings
        if grad is not None:
            shape = meeting.value.shape
            own = grad.reshape(meeting.place.rows, *shape) if meeting.place.kind == "broadcast" else grad
            meeting.deliver(ctx.meetings, grad, lambda: [own])
        return None, None, _handed_back(meeting, grad)


def _handed_back(meeting: Meeting, grad: Tensor | None) -> Tensor | None:
    if not meeting.entered or grad is None:
        return None
    return grad.sum(0).reshape(meeting.value.shape) if meeting.place.kind == "broadcast" else grad


class Valve(torch.autograd.Function):
    """A value whose gradient is handed back while `valve` holds True."""

    @staticmethod
    def forward(ctx, valve: list[bool], value: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Itself."""
        ctx.valve = valve
        return value.detach()

    @staticmethod
    def backward(ctx, grad: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient, or None."""
        return None, grad if ctx.valve[0] else None


class Split(torch.autograd.Function):
    """The result of an operation that is run again in the backward, once for each row, to split its gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        meetings: tuple[Meeting, ...],
        anchor: Tensor,
        operation: Operation,
        result: Tensor,
        *values: Tensor,
    ):
        """Remember the operation; hand on its result."""
        ctx.set_materialize_grads(False)
        ctx.meetings = meetings
        ctx.operation = operation
        ctx.versions = [x._version for x in tensors_of((operation.args, operation.kwargs))]
        ctx.num_values = len(values)
        return result.detach()

    @staticmethod
    def backward(ctx, grad: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deliver what each row sends back to each shared value; hand on the gradient."""
        if grad is not None:
            operation: Operation = ctx.operation
            given = list(tensors_of((operation.args, operation.kwargs)))
            if [x._version for x in given] != ctx.versions:
                raise RuntimeError(
                    f"expected the arguments of {operation.name!r} to stay as they were, where a value that serves all examples "
                    "meets them; got one changed in place afterwards; change a copy"
                )
            meetings: tuple[Meeting, ...] = ctx.meetings
            meetings[0].deliver(meetings, grad, lambda: _split(operation, meetings, grad))
        return None, None, None, grad, *(None,) * ctx.num_values


def _split(operation: Operation, meetings: Sequence[Meeting], grad: Tensor) -> list[Tensor]:
    own = {id(m.value): m.value.detach().requires_grad_() for m in meetings}

    def replace(value: Any) -> Any:
        if isinstance(value, Tensor):
            return own.get(id(value), value.detach())
        if isinstance(value, tuple | list):
            return type(value)(replace(x) for x in value)
        return value

    again = operation._replace(
        args=replace(operation.args), kwargs={k: replace(x) for k, x in operation.kwargs.items()}
    )
    with torch.enable_grad():
        result = again.run()
    values = [own[id(m.value)] for m in meetings]
    parts: list[list[Tensor]] = [[] for _ in meetings]
    for row in range(meetings[0].place.rows):
        one = torch.zeros_like(grad)
        one[row] = grad[row]
        found = torch.autograd.grad(result, values, one, retain_graph=True, materialize_grads=True)
        for part, value in zip(parts, found, strict=True):
            part.append(value)
    shapes = [m.value for m in meetings]
    return [
        torch.stack(part) if part else x.new_zeros(0, *x.shape) for part, x in zip(parts, shapes, strict=True)
    ]


def rows_of(operation: Operation, leaves: Sequence[Tensor]) -> int | None:
    """The size of the first dimension of what `operation` will return, where that is told by its name."""
    shape = _shape_of(operation, leaves)
    return shape[0] if shape else None


def _shape_of(operation: Operation, leaves: Sequence[Tensor]) -> Sequence[int] | None:
    name = operation.name
    if name in _ELEMENTWISE:
        return torch.broadcast_shapes(*(x.shape for x in leaves))
    if name in _ASSIGNMENTS:
        return leaves[0].shape
    if name in _PRODUCTS and min(x.dim() for x in leaves) > 1 and len(leaves) == 2:
        first, second = leaves
        lead = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
        return (*lead, first.shape[-2], second.shape[-1])
    if name == _ATTENTION and len(leaves) > 2:
        return (*leaves[0].shape[:-1], leaves[2].shape[-1])
    if name in _JOINS and leaves:
        dim = operation.kwargs.get("dim", operation.args[1] if len(operation.args) > 1 else 0)
        return leaves[0].shape if isinstance(dim, int) and dim % max(1, leaves[0].dim()) != 0 else None
    return None


def place_of(operation: Operation, value: Tensor, leaves: Sequence[Tensor], saves: bool) -> Place | None:
    """How `value` meets the others in `operation`; None where its name does not tell.

    `saves` says that what autograd saves is compared with that of a second forward: it must look the same.
    """
    shape = _shape_of(operation, leaves)
    if shape is None or (len(shape) < 2 and operation.name not in _ELEMENTWISE):
        return None
    batched = operation.name not in _ELEMENTWISE and operation.name not in _ASSIGNMENTS
    if (
        value.dim() == len(shape)
        and value.shape[0] == shape[0]
        and (not batched or len(shape) > 2 or operation.name in _JOINS)
    ):
        return Place("aligned", shape[0])
    lead = len(shape) - value.dim()
    fits = lead > 0 or (lead == 0 and value.shape[0] == 1)
    if operation.name in _JOINS or not fits or (batched and (len(shape) < 3 or value.dim() < 2)):
        return None
    if saves and operation.name not in _SAVES_NOTHING:
        return None
    return Place("broadcast", shape[0], lead)
