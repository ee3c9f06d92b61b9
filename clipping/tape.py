# SPDX-License-Identifier: Apache-2.0
"""The tape: records (layer, input, output gradient) during an ordinary backward that forms no weight gradient.

Each recorded layer runs its forward with *detached* parameters and its outputs pass through a `Tap`, an
identity whose backward hands (inputs, output gradient) to the layer's rule. Autograd therefore never forms a
weight gradient, activations are saved through autograd (so checkpointing and offloading hold), and a hook on
each parameter refuses any gradient that takes another way. When the backward ends, the collected structures
go to `on_complete`; a backward that raises leaves nothing behind.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from clipping.errors import UnrecordedParameter
from clipping.grads import SampleGrads, add
from clipping.layers import Layer, recorded_layers
from clipping.rules.generic import check_independent, generic, is_floating
from clipping.rules.registry import Inputs

OnComplete = Callable[[dict[str, SampleGrads], int], None]
"""(gradients by parameter name, B), called once at the end of each successful backward."""


class _Call(NamedTuple):
    """One forward call of one layer, as the tap must remember it beyond the tensors that autograd saves."""

    tape: Tape
    layer: Layer
    spec: pytree.TreeSpec
    constants: tuple[object, ...]
    in_backward: bool


class _Tap(torch.autograd.Function):
    """Identity on a layer's outputs whose backward delivers the layer's inputs and output gradients."""

    @staticmethod
    def forward(ctx, call: _Call, anchor: Tensor, num_outputs: int, *tensors: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[num_outputs:])
        ctx.call = call
        ctx.num_saved = len(tensors) - num_outputs
        # Detached, not viewed: autograd lets an in-place activation change this output afterwards.
        outputs = tuple(x.detach() for x in tensors[:num_outputs])
        return outputs if num_outputs > 1 else outputs[0]

    @staticmethod
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        if any(g is not None for g in grads):
            call: _Call = ctx.call
            call.tape._deliver(call, ctx.saved_tensors, grads)
        return (None, None, None, *grads, *(None,) * ctx.num_saved)


class Tape:
    """Records per-example gradients of every trainable parameter of `model` while it is attached.

    `on_complete` receives the structures at the end of each backward. `batch_dim` is the dimension of the
    batch in the tensors that layers see (0, or 1 for sequence-first models). Attaching registers module and
    parameter hooks only; `detach` removes all of them, and nothing else is ever left on the model.

    Guarantees
    ----------
    While attached, no `.grad` of a trainable parameter is written by autograd: a parameter used outside its
    recorded layer raises `UnrecordedParameter` before its gradient is stored
    (test_guarantee_autograd_never_writes_a_gradient).
    """

    def __init__(self, model: nn.Module, on_complete: OnComplete, *, batch_dim: int = 0) -> None:
        self.model = model
        self.batch_dim = batch_dim
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.layers = recorded_layers(model)
        self._on_complete = on_complete
        self._by_module = {id(layer.module): layer for layer in self.layers}
        self._anchor = torch.zeros((), requires_grad=True)
        self._hooks: list[RemovableHandle] = []
        self._stash: dict[int, list[list[tuple[nn.Module, dict[str, nn.Parameter | None]]]]] = {}
        self._probed: set[int] = set()
        self._batch_hint: int | None = None
        self._root_dims = 0
        self._paused = False
        self._task = -1
        self._found: dict[str, SampleGrads] = {}
        self._num_examples: int | None = None

    def attach(self) -> Tape:
        """Register the hooks."""
        if self._hooks:
            raise RuntimeError("expected a detached tape; got one already attached; detach it first")
        self._hooks.append(self.model.register_forward_pre_hook(self._before_root, with_kwargs=True))
        for layer in self.layers:
            module = layer.module
            self._hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True, prepend=True)
            )
        for name, parameter in self.parameters.items():
            self._hooks.append(parameter.register_hook(_refuse(name)))
        return self

    def detach(self) -> None:
        """Remove every hook and forget what a failed backward left."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._forget()

    def __enter__(self) -> Tape:
        """Attach."""
        return self.attach()

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    # -- forward ----------------------------------------------------------------------------------------

    def _before_root(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 0]
        first = tensors[0] if tensors else None
        dim = self.batch_dim if first is not None and first.dim() > self.batch_dim else 0
        self._batch_hint = None if first is None else first.shape[dim]
        self._root_dims = 0 if first is None else first.dim()

    def _before(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        if self._paused or not torch.is_grad_enabled() or id(module) not in self._by_module:
            return None
        held: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
        for member in self._by_module[id(module)].members:
            held.append((member, dict(member._parameters)))
            for name, parameter in member._parameters.items():
                if parameter is not None:
                    member._parameters[name] = parameter.detach()  # pyright: ignore[reportArgumentType]
        self._stash.setdefault(id(module), []).append(held)
        return self._expanded(self._by_module[id(module)], args, kwargs)

    def _expanded(
        self, layer: Layer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        # Position ids of shape (1, T) stand for every example: expanded, their gradient arrives per example.
        hint, dim = self._batch_hint, self.batch_dim
        if layer.rule is not None and isinstance(layer.module, nn.Embedding):
            self._refuse_flat_indices(layer, args, kwargs)
        if hint is None or hint == 1 or layer.rule is None:
            return None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if not tensors or tensors[0].dim() < 2 or tensors[0].shape[dim] != 1:
            return None
        size = [-1] * tensors[0].dim()
        size[dim] = hint
        first = tensors[0]
        return pytree.tree_unflatten([first.expand(size) if x is first else x for x in leaves], spec)

    def _refuse_flat_indices(self, layer: Layer, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        first = Inputs(args, kwargs).first
        if first.dim() == 1 and self._root_dims > 1:
            raise ValueError(
                f"expected indices with the batch in dimension {self.batch_dim} for embedding {layer.name!r}; got "
                f"shape {tuple(first.shape)}, whose gradient is summed over the examples before it can be "
                "clipped; give positions the shape (1, T) or (B, T)"
            )

    def _after(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], outputs: object
    ) -> object:
        stack = self._stash.get(id(module))
        if not stack:
            return None
        for member, parameters in stack.pop():
            member._parameters.update(parameters)
        if outputs is None or not torch.is_grad_enabled():
            return None
        return self._tapped(self._by_module[id(module)], Inputs(args, kwargs), outputs)

    def _tapped(self, layer: Layer, inputs: Inputs, outputs: object) -> object:
        out_leaves, out_spec = pytree.tree_flatten(outputs)
        floating = [x for x in out_leaves if is_floating(x)]
        if not floating:
            return None
        in_backward = torch._C._current_graph_task_id() != -1
        if layer.rule is None and id(layer.module) not in self._probed and floating[0].shape[0] > 1:
            check_independent(layer.module, layer.name, inputs, [x.detach() for x in floating])
            self._probed.add(id(layer.module))
        in_leaves, in_spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
        tensors = [x.detach() for x in in_leaves if isinstance(x, Tensor)]
        constants = tuple(_TENSOR if isinstance(x, Tensor) else x for x in in_leaves)
        call = _Call(self, layer, in_spec, constants, in_backward)
        tapped = _Tap.apply(call, self._anchor, len(floating), *floating, *tensors)
        supply = iter(tapped if isinstance(tapped, tuple) else (tapped,))
        return pytree.tree_unflatten([next(supply) if is_floating(x) else x for x in out_leaves], out_spec)

    # -- backward ---------------------------------------------------------------------------------------

    def _deliver(self, call: _Call, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> None:
        if call.in_backward:
            raise RuntimeError(
                f"expected layer {call.layer.name!r} to run before the backward; got reentrant gradient "
                "checkpointing, which hides layers from the record; use use_reentrant=False (in transformers: "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}))'
            )
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._forget()
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._complete)
        supply = iter(saved)
        leaves = [next(supply) if x is _TENSOR else x for x in call.constants]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        inputs, grads = self._batch_first(Inputs(args, kwargs), grads)
        self._check_batch(call.layer, grads)
        for local, found in self._apply_rule(call.layer, inputs, grads).items():
            name = call.layer.names[local]
            known = self._found.get(name)
            self._found[name] = found if known is None else add(known, found)

    def _apply_rule(
        self, layer: Layer, inputs: Inputs, grads: tuple[Tensor | None, ...]
    ) -> dict[str, SampleGrads]:
        if layer.rule is not None:
            (grad,) = (g for g in grads if g is not None)
            return layer.rule(layer.module, inputs, grad)
        self._paused = True  # the generic rule runs the module again: that run is not a use of it
        try:
            return generic(layer.module, inputs, grads)
        finally:
            self._paused = False

    def _batch_first(
        self, inputs: Inputs, grads: tuple[Tensor | None, ...]
    ) -> tuple[Inputs, tuple[Tensor | None, ...]]:
        if self.batch_dim == 0:
            return inputs, grads
        moved = pytree.tree_map(self._move, (inputs.args, dict(inputs.kwargs)))
        return Inputs(*moved), tuple(None if g is None else self._move(g) for g in grads)

    def _move(self, value: Any) -> Any:
        # A recurrent cell sees (B, D) at each position; only indices have the batch in a 2-D tensor's dimension 1.
        if isinstance(value, Tensor) and (value.dim() > 2 or (value.dim() == 2 and not is_floating(value))):
            return value.movedim(self.batch_dim, 0)
        return value

    def _check_batch(self, layer: Layer, grads: tuple[Tensor | None, ...]) -> None:
        for grad in grads:
            if grad is None:
                continue
            rows = grad.shape[0] if grad.dim() else 0
            if self._num_examples is None:
                self._num_examples = rows
            if rows != self._num_examples:
                raise ValueError(
                    f"expected every layer to see the batch in one dimension ({self._num_examples} examples); got "
                    f"{rows} rows at {layer.name or 'model'!r} (output {tuple(grad.shape)}); do not fold positions "
                    "into the batch, and give positions the shape (1, T) or (B, T)"
                )

    def _complete(self) -> None:
        found, num_examples = self._found, self._num_examples or 0
        self._forget()
        self._on_complete(found, num_examples)

    def _forget(self) -> None:
        self._task = -1
        self._found = {}
        self._num_examples = None


_TENSOR = object()


def _refuse(name: str) -> Callable[[Tensor], None]:
    def hook(_: Tensor) -> None:
        raise UnrecordedParameter(
            f"expected parameter {name!r} to be used only inside the forward of the module that owns it; got a "
            "gradient by another way (used directly, through a functional call, or by a module whose forward is "
            "bypassed); call the owning module, or freeze the parameter"
        )

    return hook
