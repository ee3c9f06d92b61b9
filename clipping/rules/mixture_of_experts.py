# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts of transformers: stacked expert weights, and routers that choose among them.

Shapes: B examples, T positions, S = T * K slots for K experts of each position, E experts, D width, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clipping.errors import MixesExamples
from clipping.gradients.outer import Outer
from clipping.gradients.routed import Routed
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.norms import accumulator_dtype
from clipping.rules.registry import Inputs, batch_first, folds, rule, trainable


def _classes(suffix: str) -> tuple[str, ...]:
    names = (("mixtral", "Mixtral"), ("qwen2_moe", "Qwen2Moe"), ("qwen3_moe", "Qwen3Moe"), ("olmoe", "Olmoe"))
    return tuple(f"transformers.models.{m}.modeling_{m}.{name}{suffix}" for m, name in names)


folds(*_classes("SparseMoeBlock"))  # each begins with hidden_states.view(-1, hidden_dim)


class _Linear(TorchFunctionMode):
    """Makes the output of the one product with `weight` the variable of what follows."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.outputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is F.linear and args[1] is self.weight:
            made = made.detach().requires_grad_()
            self.outputs.append(made)
        return made


@rule(*_classes("TopKRouter"), parameters=("weight",), batch_dims=batch_first)
def router(layer: nn.Module, inputs: Inputs, grads: Sequence[Tensor | None]) -> dict[str, SampleGrads]:
    """A linear layer to one logit per expert, and whatever the router makes of the logits."""
    if (
        grads[0] is not None
    ):  # the block uses the choice alone: only a loss on the logits sends a gradient here
        raise MixesExamples(
            f"expected the logits of {type(layer).__name__} to stay inside its block; got a gradient from outside, as "
            "load-balancing losses send it, which average over the batch; set output_router_logits=False, or "
            "freeze the router and drop that loss"
        )
    weight = cast(Tensor, layer._parameters["weight"])
    values = inputs.first
    with torch.enable_grad(), _Linear(weight) as mode:
        outputs = cast(Any, layer).forward(values.flatten(0, 1))
    if len(mode.outputs) != 1:
        raise ValueError(
            f"expected {type(layer).__name__} to use its weight in one linear product; got {len(mode.outputs)}; "
            "give this version of the class a rule with @clipping.rule"
        )
    floating = [x for x in outputs if x.is_floating_point()]
    pairs = [(x, g.reshape(x.shape)) for x, g in zip(floating, grads, strict=True) if g is not None]
    sent, cotangents = zip(*pairs, strict=True)
    (grad,) = torch.autograd.grad(sent, mode.outputs, cotangents)
    left = grad.reshape(*values.shape[:2], grad.shape[-1]).unsqueeze(1)
    return {"weight": Outer(left, values.unsqueeze(1), weight.shape)}


def experts_batch_dims(layer: nn.Module, inputs: Inputs, outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Dimension 0; raises for layouts of the weights that the rule does not know."""
    odd = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    found = [name for name in odd if getattr(layer, name, False)]
    if found:
        raise ValueError(
            f"expected experts without biases, as (E, outputs, inputs), on one device; got {type(layer).__name__} "
            f"with {found}; freeze the experts, or give the class a rule with @clipping.rule"
        )
    return batch_first(layer, inputs, outputs)


class _Slots(NamedTuple):
    """What the slots of all examples hold, (B, S, ...), filled expert by expert."""

    from_up: Tensor
    hidden: Tensor
    from_down: Tensor


def _fill(layer: nn.Module, slots: _Slots, values: Tensor, chosen: Tensor) -> None:
    """`slots.from_down` holds the output gradient of each slot; compute the rest. `values` is (B * S, D)."""
    up, down = (cast(Tensor, layer._parameters[name]).detach() for name in ("gate_up_proj", "down_proj"))
    apply_gate = cast(Any, layer)._apply_gate
    from_up, hidden, from_down = (x.flatten(0, 1) for x in slots)
    for expert in range(up.shape[0]):
        mine = (chosen == expert).nonzero().squeeze(1)
        if not len(mine):
            continue
        before = F.linear(values[mine].to(up.dtype), up[expert]).requires_grad_()
        with torch.enable_grad():
            after = apply_gate(before)
        back = (from_down[mine].to(down.dtype) @ down[expert]).to(after.dtype)
        (grad,) = torch.autograd.grad(after, before, back)
        from_up[mine], hidden[mine] = grad.to(from_up.dtype), after.detach().to(hidden.dtype)


@rule(*_classes("Experts"), parameters=("gate_up_proj", "down_proj"), batch_dims=experts_batch_dims)
def experts(layer: nn.Module, inputs: Inputs, grads: Sequence[Tensor | None]) -> dict[str, SampleGrads]:
    """Gated experts in stacked weights: each slot adds an outer product to its own expert's block."""
    named = inputs.named(layer)
    names = ("hidden_states", "top_k_index", "top_k_weights")
    values, chosen, shares = (cast(Tensor, named[name]) for name in names)
    (grad,) = grads
    assert grad is not None
    num_examples, num_positions, num_chosen = chosen.shape
    lead, dtype = (num_examples, num_positions * num_chosen), accumulator_dtype(values.dtype)
    down = cast(Tensor, layer._parameters["down_proj"])
    num_experts, _, width = down.shape
    spread = values.unsqueeze(2).expand(-1, -1, num_chosen, -1).reshape(*lead, -1)
    from_down = (grad.unsqueeze(2).to(dtype) * shares.unsqueeze(-1)).reshape(*lead, -1)
    from_up, hidden = (values.new_zeros(*lead, size, dtype=dtype) for size in (2 * width, width))
    slots = _Slots(from_up, hidden, from_down)
    _fill(layer, slots, spread.flatten(0, 1), chosen.flatten())
    index = chosen.reshape(lead)
    found: dict[str, SampleGrads] = {}
    if trainable(layer, "gate_up_proj"):
        found["gate_up_proj"] = Routed(index, slots.from_up, spread, num_experts)
    if trainable(layer, "down_proj"):
        found["down_proj"] = Routed(index, slots.from_down, slots.hidden, num_experts)
    return found
