# SPDX-License-Identifier: Apache-2.0
"""The tap on a layer's outputs, and what it remembers between a layer's forward and its backward.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from clipping.engines import Begin
from clipping.errors import UnrecordedParameter
from clipping.folds import Fold
from clipping.grads import SampleGrads
from clipping.layers import Layer
from clipping.meetings import Meeting
from clipping.precision import exact_products
from clipping.rules.generic import BatchDims
from clipping.structures import Structure
from clipping.sums import add
from clipping.turns import Origin
from clipping.unruled import Kept

Deliver = Callable[["Call", tuple[Tensor, ...], tuple[Tensor | None, ...]], None]
"""(call, saved inputs, output gradients): what the tap's backward hands over."""


class Autocast(NamedTuple):
    """The mixed precision of a forward call, in which the generic rule must run the module again."""

    device_type: str
    dtype: torch.dtype
    enabled: bool

    @staticmethod
    def of(device_type: str) -> Autocast:
        """The state in force now."""
        dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
        return Autocast(device_type, dtype, enabled)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Call:
    """One forward call of one layer, as the tap must remember it beyond the tensors that autograd saves.

    It lives as long as the graph in which it can deliver.
    """

    deliver: Deliver
    layer: Layer
    structure: Structure
    constants: tuple[object, ...]
    dims: BatchDims | None
    autocast: Autocast
    in_backward: bool
    fold: Fold | None
    origin: Origin
    kept: Kept | None = None
    spread: torch.Size | None = None
    """The shape of the output of a call that serves all examples, before it was expanded to one for each."""


Point = Call | Meeting
"""What delivers in a backward, once: a call of a layer, or a shared value where it meets the examples."""


def _exhausted(delivered: set[Point], calls: WeakSet[Point]) -> bool:
    return all(call in delivered for call in calls)


def _idle(
    found: Mapping[str, SampleGrads], delivered: set[Point], calls: Mapping[str, WeakSet[Point]], name: str
) -> bool:
    """Whether nothing of `name` is still to be handed over before the end of the backward."""
    return name not in found and _exhausted(delivered, calls[name])


class Record:
    """What one backward has delivered so far; it lives as long as that backward.

    `calls` are, for each parameter, the calls still alive: each delivers at most once in a backward, so that a
    parameter is whole when all of them have.
    """

    def __init__(
        self, begin: Begin, calls: Mapping[str, WeakSet[Point]], lock: AbstractContextManager[object]
    ) -> None:
        self.num_examples: int | None = None
        self._lock = lock
        self._calls = calls
        # The calls themselves: the id of one that is gone may be that of another.
        self._delivered: set[Point] = set()
        self._found: dict[str, SampleGrads] = {}
        self._checks: list[Callable[[], None]] = []
        # Not a bound method: a cycle would keep a failed backward's tensors until the collector of cycles runs.
        self._collector = begin(partial(_idle, self._found, self._delivered, calls))

    @property
    def unit(self) -> object | None:
        """What the examples of this backward are clipped with; None where nothing of it is added."""
        return self._collector.unit

    def _exhausted(self, name: str) -> bool:
        return _exhausted(self._delivered, self._calls[name])

    def take(self, point: Point, names: Iterable[str], grads: Mapping[str, SampleGrads]) -> None:
        """Keep what `point` delivered of `names`, by parameter name; hand over the parameters that are whole."""
        self._delivered.add(point)
        for name, found in grads.items():
            known = self._found.get(name)
            self._found[name] = found if known is None else add(known, found)
        whole = [name for name in dict.fromkeys(names) if name in self._found and self._exhausted(name)]
        if whole:
            self._hand_over(whole)

    def check(self, check: Callable[[], None], *, now: bool) -> None:
        """Run `check`, at the end of the backward unless `now`: it waits for the device."""
        if now:
            check()
        else:
            self._checks.append(check)

    def complete(self) -> None:
        """Hand over the rest."""
        for check in self._checks:
            check()
        with self._lock, exact_products():
            self._hand_over(list(self._found))
            self._collector.complete(self.num_examples or 0)

    def _hand_over(self, names: list[str]) -> None:
        with exact_products():
            for name in names:
                self._collector.ready(name, self._found.pop(name), self.num_examples or 0)


class Refusal(NamedTuple):
    """The hook on a parameter: any gradient that autograd brings there while `recording` has bypassed the record."""

    name: str
    recording: Callable[[], bool]

    def __call__(self, _: Tensor) -> None:
        """Refuse the gradient."""
        if not self.recording():
            return
        raise UnrecordedParameter(
            f"expected parameter {self.name!r} to be used only inside the forward of the module that owns it; got "
            "a gradient by another way (used directly, through a functional call, or by a module whose forward is "
            "bypassed); call the owning module, or freeze the parameter"
        )


class Tap(torch.autograd.Function):
    """Identity on a layer's outputs whose backward delivers the layer's inputs and output gradients."""

    @staticmethod
    def forward(ctx, call: Call, anchor: Tensor, num_outputs: int, *tensors: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Remember the inputs; hand on the outputs."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[num_outputs:])
        ctx.call = call
        ctx.num_saved = len(tensors) - num_outputs
        # Detached, not viewed: autograd lets an in-place activation change this output afterwards.
        outputs = tuple(x.detach() for x in tensors[:num_outputs])
        return outputs if num_outputs > 1 else outputs[0]

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Deliver inputs and output gradients; hand on the gradients."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a backward of first order; got create_graph=True, whose second-order terms the record "
                "does not see; drop create_graph, and in place of a penalty on the gradient take one on a difference "
                "quotient of outputs, (model(x + h * direction) - model(x)) / h"
            )
        # torch.autograd.grad for given inputs leaves parameters out, for which the anchor stands: nothing is to record.
        if _is_run(ctx.next_functions[0][0]) and any(g is not None for g in grads):
            call: Call = ctx.call
            call.deliver(call, ctx.saved_tensors, grads)
        return (None, None, None, *grads, *(None,) * ctx.num_saved)


def _is_run(node: object) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)  # pyright: ignore[reportArgumentType]
    except RuntimeError:  # it is itself what torch.autograd.grad was asked for
        return True


def refuse_taped(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise RuntimeError where another tape is attached to one of `parameters`."""
    for name, parameter in parameters.items():
        if any(isinstance(hook, Refusal) for hook in (parameter._backward_hooks or {}).values()):
            raise RuntimeError(
                f"expected a model that no tape records; got parameter {name!r} under another one, which would count "
                "its examples too; detach that tape first"
            )
