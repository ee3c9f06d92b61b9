# SPDX-License-Identifier: Apache-2.0
"""The tap on a layer's outputs, and what it remembers between a layer's forward and its backward.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from clipping.errors import UnrecordedParameter
from clipping.grads import SampleGrads
from clipping.layers import Layer
from clipping.rules.generic import BatchDims

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


class Call(NamedTuple):
    """One forward call of one layer, as the tap must remember it beyond the tensors that autograd saves."""

    deliver: Deliver
    layer: Layer
    spec: pytree.TreeSpec
    constants: tuple[object, ...]
    dims: BatchDims | None
    autocast: Autocast
    in_backward: bool


class Record:
    """What one backward has delivered so far; it lives as long as that backward."""

    def __init__(self) -> None:
        self.found: dict[str, SampleGrads] = {}
        self.num_examples: int | None = None


class Refusal(NamedTuple):
    """The hook on a parameter: any gradient that autograd brings there has bypassed the record."""

    name: str

    def __call__(self, _: Tensor) -> None:
        """Refuse the gradient."""
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
                "does not see; drop create_graph, or compute the penalty on a detached copy of the model"
            )
        if any(g is not None for g in grads):
            call: Call = ctx.call
            call.deliver(call, ctx.saved_tensors, grads)
        return (None, None, None, *grads, *(None,) * ctx.num_saved)
