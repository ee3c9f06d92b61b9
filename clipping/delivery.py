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

from clipping.layers import Layer
from clipping.rules.dropouts import draws_masks, layer_batch_dim
from clipping.rules.generic import is_floating
from clipping.rules.registry import Inputs
from clipping.structures import flatten
from clipping.tap import Record


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


def check_batch(record: Record, layer: Layer, grad: Tensor, dim: int | None) -> None:
    """Raise ValueError unless `grad` has as many rows as the other layers of this backward saw."""
    check_rows(record, layer, grad.shape[dim] if dim is not None and grad.dim() > dim else 0, grad)


def check_rows(record: Record, layer: Layer, rows: int, shown: Tensor) -> None:
    """Raise ValueError unless `rows` is the number of examples that the other layers of this backward saw."""
    if record.num_examples is None:
        record.num_examples = rows
    if rows != record.num_examples:
        raise ValueError(
            f"expected every layer to see the batch in one dimension ({record.num_examples} examples); got "
            f"{rows} rows at {layer.name or 'model'!r} (output {tuple(shown.shape)}); do not fold positions "
            "into the batch or send a selection of rows to a layer (an expert takes all rows, and zero weights), and "
            "give positions the shape (1, T) or (B, T)"
        )


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


def refuse_flat_indices(layer: Layer, first: Tensor, root_dims: int, batch_dim: int) -> None:
    """Raise ValueError where an embedding sees indices of one dimension, in a model that is not given such."""
    if first.dim() == 1 and root_dims != 1:
        raise ValueError(
            f"expected indices with the batch in dimension {batch_dim} for embedding {layer.name!r}; got "
            f"shape {tuple(first.shape)}, whose gradient is summed over the examples before it can be "
            "clipped; give positions the shape (1, T) or (B, T)"
        )


def refuse_rounded(layer: Layer, grads: tuple[Tensor | None, ...], *, mean: bool) -> None:
    """Raise TypeError for gradients of a mean of losses in bfloat16 or float16.

    One over the batch size has 8 bits there, and so has each product with it: how all examples are rounded depends on
    how many were drawn, which adds up to many clip norms in large batches.
    """
    low = [g.dtype for g in grads if g is not None and g.dtype in (torch.bfloat16, torch.float16)]
    if mean and low:
        raise TypeError(
            f"expected the sum of the losses where gradients are {low[0]}, as in layer {layer.name!r}; got their mean, whose "
            'division by the size of the batch is rounded for all examples alike; use reduction="sum", and say so with '
            'loss_reduction="sum"'
        )
