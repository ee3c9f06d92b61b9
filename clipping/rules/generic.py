# SPDX-License-Identifier: Apache-2.0
"""The rule for any other module that does not mix examples: its own forward, differentiated example by example.

It costs a second forward and B times the parameters in memory, so it is meant for small or rare modules.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from clipping.errors import MixesExamples
from clipping.grads import Dense, SampleGrads
from clipping.rules.registry import Inputs


def is_floating(value: object) -> bool:
    """Whether `value` is a tensor through which gradients can flow."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _split(inputs: Inputs, num_examples: int) -> tuple[list[object], list[bool], pytree.TreeSpec]:
    leaves, spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
    batched = [isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == num_examples for x in leaves]
    return leaves, batched, spec


class _OneExample:
    """The module as a function of its parameters and of one example's rows."""

    def __init__(self, module: nn.Module, inputs: Inputs, num_examples: int) -> None:
        self.module = module
        self.leaves, self.batched, self.spec = _split(inputs, num_examples)

    @property
    def rows(self) -> tuple[Tensor, ...]:
        chosen = (x for x, flag in zip(self.leaves, self.batched, strict=True) if flag)
        return tuple(x.unsqueeze(1) for x in chosen if isinstance(x, Tensor))

    def __call__(self, parameters: dict[str, Tensor], rows: tuple[Tensor, ...]) -> list[Tensor]:
        supply = iter(rows)
        leaves = [next(supply) if flag else x for x, flag in zip(self.leaves, self.batched, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        outputs = functional_call(self.module, parameters, args, kwargs)
        return [x for x in pytree.tree_leaves(outputs) if is_floating(x)]


def generic(module: nn.Module, inputs: Inputs, grads: Sequence[Tensor | None]) -> dict[str, SampleGrads]:
    """Per-example gradients of every trainable parameter below `module`, by vmap over its forward.

    `grads` holds one output gradient (B, ...) or None for each floating-point output of the module.
    """
    present = [g for g in grads if g is not None]
    num_examples = present[0].shape[0]
    one = _OneExample(module, inputs, num_examples)
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    names = [index for index, g in enumerate(grads) if g is not None]

    def paired(values: dict[str, Tensor], rows: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> Tensor:
        outputs = one(values, rows)
        terms = [(outputs[i] * c).sum() for i, c in zip(names, cotangents, strict=True)]
        return torch.stack(terms).sum()

    with torch.enable_grad():
        found = vmap(grad(paired), in_dims=(None, 0, 0), randomness="different")(
            parameters, one.rows, tuple(g.unsqueeze(1) for g in present)
        )
    return {name: Dense(value) for name, value in found.items()}


def check_independent(module: nn.Module, name: str, inputs: Inputs, outputs: Sequence[Tensor]) -> None:
    """Refuse `module` unless running its examples one at a time gives the rows of its batched outputs.

    Raises `MixesExamples` where they differ: the module mixes examples, or draws random numbers.
    """
    num_examples = outputs[0].shape[0]
    one = _OneExample(module, inputs, num_examples)
    parameters = {key: p.detach() for key, p in module.named_parameters()}
    with torch.no_grad():
        rows = vmap(one, in_dims=(None, 0), randomness="different")(parameters, one.rows)
    for single, batched in zip(rows, outputs, strict=True):
        expected = single.squeeze(1)
        tolerance = 1e-3 if batched.dtype != torch.float64 else 1e-9
        if expected.shape != batched.shape or not torch.allclose(
            expected, batched, rtol=tolerance, atol=tolerance, equal_nan=True
        ):
            raise MixesExamples(
                f"expected module {name or 'model'!r} ({type(module).__name__}), which has no rule of its own, to "
                "give each example the output it gives that example alone; got another output, so it mixes "
                "examples or draws random numbers; keep the batch in dimension 0, move dropout into a module "
                "without parameters, or register a rule for it with clipping.register_rule"
            )
