# SPDX-License-Identifier: Apache-2.0
"""A forward whose children keep rules of their own: what goes into each child, what comes out, and what comes back.

The parameters that the module's own code uses become stand-ins that ask for gradients (`Mark`), so that autograd
brings back the gradient of everything that depends on them: of the outputs, and of what goes into the children. When
all of it is there the stand-ins' own gradient is asked for, and dropped: it is a sum over the examples.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipping.errors import UnrecordedParameter
from clipping.reruns.nested_values import flatten, is_floating, unflatten
from clipping.reruns.random_state import Sources
from clipping.reruns.reruns import ChildCall


class Arrivals:
    """What one backward has brought so far: saved tensors, and gradients by their number among the outputs."""

    def __init__(self) -> None:
        self.task = -1
        self.saved: tuple[Tensor, ...] | None = None
        self.outputs: tuple[Tensor | None, ...] = ()
        self.inputs: dict[int, Tensor] = {}
        self.num_inputs = 0
        self.call: Any = None

    def of(self, call: Any) -> Any:
        """Take the gradients that `call` would deliver, to deliver them when all are there; what the tap calls."""
        self.call = call
        return replace(call, deliver=self.take_outputs)

    def current(self) -> Arrivals:
        """Itself, emptied where another backward runs than that whose gradients are held."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task, self.saved, self.outputs, self.inputs = task, None, (), {}
        return self

    def take_input(self, number: int, grad: Tensor) -> None:
        """The gradient of what went into a child."""
        inputs = self.current().inputs
        inputs[number] = inputs[number] + grad if number in inputs else grad

    def take_outputs(self, _: object, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> None:
        """The gradients of the outputs."""
        found = self.current()
        found.saved, found.outputs = saved, grads

    def all_came(self) -> None:
        """Nothing is left that depends on the stand-ins: deliver, as the tap of another layer does."""
        found = self.current()
        if self.call is None:  # the forward raised, or returned nothing
            return
        if found.saved is None:
            raise UnrecordedParameter(
                f"expected losses of what module {self.call.layer.name or 'model'!r} returns; got a gradient of something "
                "that it keeps or hands out otherwise, which is summed over the examples; return it"
            )
        saved, outputs, inputs = found.saved, found.outputs, found.inputs
        found.saved, found.outputs, found.inputs = None, (), {}
        number = self.num_inputs
        self.call.deliver(self.call, saved, (*outputs, *(inputs.get(i) for i in range(number))))


class Mark(torch.autograd.Function):
    """Stand-ins for parameters, whose backward says that all gradients they lead to have come."""

    @staticmethod
    def forward(ctx: Any, arrivals: Arrivals, anchor: Tensor, *parameters: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Hand the parameters on."""
        ctx.set_materialize_grads(False)
        ctx.arrivals = arrivals
        return tuple(x.detach() for x in parameters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Drop the gradients: they are summed over the examples."""
        ctx.arrivals.all_came()
        return (None, None, *(None,) * len(grads))


class OwnRun:
    """One running forward: the children it has called, outermost ones only.

    Outputs of the children in `copied` (None: of all) are kept as copies, as the own code may change them in place.
    """

    def __init__(
        self,
        arrivals: Arrivals,
        sources: Sources,
        opened: frozenset[int],
        copied: frozenset[int] | None = None,
    ) -> None:
        self.arrivals = arrivals
        self.calls: list[ChildCall] = []
        self.leaves: list[object] = []
        self.inputs: list[Tensor] = []
        self.moved = False
        self._sources = sources
        self._opened = opened
        self._copied = copied
        self._given: list[tuple[nn.Module, Tensor, int]] = []
        self._state = sources.read()
        self._depth = 0
        self.modules_of_inputs: list[nn.Module] = []

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A child is called: watch the gradients of its inputs."""
        if id(module) in self._opened:
            return None
        self._depth += 1
        if self._depth > 1:
            return None
        self.moved = self.moved or not self._sources.read().same(self._state)
        leaves, structure = flatten((args, kwargs))
        return unflatten([self._watched(module, x) for x in leaves], structure)  # pyright: ignore[reportReturnType]

    def leave(self, module: nn.Module, outputs: object) -> None:
        """The child has returned `outputs`, or raised (None)."""
        if id(module) in self._opened:
            return
        self._depth -= 1
        if self._depth > 0:
            return
        leaves, structure = flatten(outputs)
        self._state = self._sources.read()
        number = sum(call.module is module for call in self.calls)
        taken = len(self.modules_of_inputs) - sum(call.num_inputs for call in self.calls)
        self.calls.append(ChildCall(module, number, taken, structure, len(leaves), self._state))
        copied = self._copied is None or id(module) in self._copied
        self.leaves += [x.detach().clone() if copied and isinstance(x, Tensor) else x for x in leaves]
        if self._copied is None:
            self._given += [(module, x, x._version) for x in leaves if isinstance(x, Tensor)]

    def end(self) -> None:
        """The own code has ended: note whether it drew."""
        self.arrivals.num_inputs = len(self.modules_of_inputs)
        self.moved = self.moved or not self._sources.read().same(self._state)

    @property
    def changed(self) -> frozenset[int]:
        """The children whose outputs were changed in place afterwards."""
        return frozenset(id(module) for module, x, version in self._given if x._version != version)

    def _watched(self, module: nn.Module, value: object) -> object:
        if not is_floating(value):
            return value
        assert isinstance(value, Tensor)
        number = len(self.modules_of_inputs)
        self.modules_of_inputs.append(module)
        self.inputs.append(value.detach())
        if not (value.requires_grad and torch.is_grad_enabled()):
            return value
        # A view, so that the child may change it in place, with a hook for the gradient by this use alone.
        seen = value.view_as(value)
        seen.register_hook(partial(self.arrivals.take_input, number))
        return seen
