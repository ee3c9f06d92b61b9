# SPDX-License-Identifier: Apache-2.0
"""The tap on a layer's outputs, and what it remembers between a layer's forward and its backward.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipping.errors import UnrecordedParameter
from clipping.modules.generic_rule import BatchDims
from clipping.modules.layers import Layer
from clipping.modules.replay import Origin
from clipping.modules.unruled_calls import Kept
from clipping.recording.folded_positions import Fold
from clipping.reruns.nested_values import Structure
from clipping.shared_values.first_meetings import Meeting

Deliver = Callable[["Call", tuple[Tensor, ...], tuple[Tensor | None, ...]], None]
"""(call, saved inputs, output gradients): what the tap's backward hands over."""


class Autocast(NamedTuple):
    """The mixed precision of a forward call, in which the generic rule must run the module again."""

    device_type: str
    dtype: torch.dtype
    enabled: bool


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Call:
    """One forward call of one layer, as the tap must remember it beyond the tensors that autograd saves.

    It lives as long as the graph in which it can deliver.
    """

    deliver: Deliver
    layer: Layer
    structure: Structure | None
    """That of the arguments; None: one tensor."""
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


def tapped(
    call: object, anchor: Tensor, outputs: Sequence[Tensor], inputs: Sequence[object]
) -> Sequence[Tensor]:
    """`outputs` through a tap that delivers `call`, with the tensors among its inputs, in the backward."""
    given = [x.detach() for x in inputs if isinstance(x, Tensor)]
    found = Tap.apply(call, anchor, len(outputs), *outputs, *given)
    return found if isinstance(found, tuple) else (found,)


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
