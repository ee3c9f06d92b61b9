# SPDX-License-Identifier: Apache-2.0
"""Checks between a tap and a rule: which tensors a layer may return, and that their rows are the examples.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from clipping.modules.layers import Layer
from clipping.reruns.nested_values import flatten, is_floating
from clipping.rules.dropouts import draws_masks, layer_batch_dim
from clipping.rules.packed_sequences import packed_input
from clipping.rules.registry import Inputs

LOW = (torch.bfloat16, torch.float16)
"""What keeps too few bits for a number that all examples share."""


def batch_first(inputs: Inputs, grad: Tensor, batch_dim: int) -> tuple[Inputs, Tensor]:
    """Inputs and output gradient with the batch in dimension 0."""
    if batch_dim == 0:
        return inputs, grad

    def move(value: Any) -> Any:
        # A recurrent cell sees (B, D) at each position; only indices have the batch in a 2-D tensor's dimension 1.
        if isinstance(value, Tensor) and (value.dim() > 2 or (value.dim() == 2 and not is_floating(value))):
            return value.movedim(batch_dim, 0)
        return value

    return Inputs(*pytree.tree_map(move, (inputs.args, dict(inputs.kwargs)))), move(grad)


def only(layer: Layer, grads: tuple[Tensor | None, ...]) -> Tensor:
    """The gradient of a layer with one floating-point output."""
    (grad,) = grads if len(grads) == 1 else (None,)
    if grad is None:
        raise TypeError(
            f"expected one floating-point output of layer {layer.name or 'model'!r}, whose rule takes one gradient; "
            f"got {len(grads)}; give its rule batch_dims, and it takes a gradient or None for each output"
        )
    return grad


def sees_the_batch(layer: Layer, inputs: Inputs, outputs: object, batch_dim: int, hint: int | None) -> bool:
    """Whether a call of `layer`, seen as it runs, has one row for each example."""
    found = [x for x in flatten(outputs)[0] if isinstance(x, Tensor) and is_floating(x)]
    if not found or hint is None:
        return True
    dims: tuple[int, ...] = ()
    if draws_masks(layer.module):
        dims = (layer_batch_dim(layer.module) or 0,)
    elif layer.rule is not None and layer.rule.batch_dims is not None:
        try:
            dims = layer.rule.batch_dims(layer.module, inputs, found)
        except (ValueError, TypeError):
            return False
    dim = dims[0] if dims else batch_dim if found[0].dim() > 2 else 0
    return found[0].dim() > dim and found[0].shape[dim] == hint


def refuse_opaque(layer: Layer, leaves: list[object], known: Sequence[object] = ()) -> None:
    """Raise TypeError where a layer returns an object whose tensors cannot be seen, and which no child gave it."""
    for leaf in leaves:
        if any(leaf is x for x in known):
            continue
        if not isinstance(leaf, Tensor | str | int | float | bool | None):
            raise TypeError(
                f"expected layer {layer.name or 'model'!r} to return tensors in tuples, lists or dicts; got a "
                f"{type(leaf).__name__}, whose tensors cannot be recorded; return them openly, or register the "
                "class with torch.utils._pytree.register_pytree_node"
            )


def refuse_rounded(name: str, grads: tuple[Tensor | None, ...], *, mean: bool) -> None:
    """Raise TypeError for gradients of a mean of losses in bfloat16 or float16.

    One over the batch size has 8 bits there, and so has each product with it: how all examples are rounded depends on
    how many were drawn, which adds up to many clip norms in large batches.
    """
    low = [g.dtype for g in grads if g is not None and g.dtype in LOW]
    if mean and low:
        raise TypeError(
            f"expected the sum of the losses where gradients are {low[0]}, as in layer {name!r}; got their mean, whose "
            'division by the size of the batch is rounded for all examples alike; use reduction="sum", and say so with '
            'loss_reduction="sum"'
        )


def refuse_packed(layer: Layer, inputs: Inputs) -> None:
    """Raise TypeError where a layer that cannot tell a packed sequence's examples apart is called with one."""
    packed = packed_input(inputs)
    if packed is None:
        return
    is_leaf = len(pytree.tree_leaves(packed)) == 1  # torch < 2.7 does not look inside
    if layer.rule is None or is_leaf:
        raise TypeError(
            f"expected padded tensors (B, T, D) at {layer.name or 'model'!r} ({type(layer.module).__name__}); got a "
            "PackedSequence, whose rows are not the examples; give packed sequences to nn.LSTM, nn.GRU or nn.RNN only, "
            "and padded ones (torch.nn.utils.rnn.pad_packed_sequence) to other modules"
        )
