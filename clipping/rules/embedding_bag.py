# SPDX-License-Identifier: Apache-2.0
"""Bags of embeddings: every row of a bag gets the bag's output gradient, weighted as the bag was reduced.

Shapes: B examples, T positions, D width, V rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from clipping.gradients.rows import Rows
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.norms import widen
from clipping.rules.embedding import refuse_batch_statistics
from clipping.rules.registry import Inputs, batch_first, rule


class _Bags(NamedTuple):
    """Indices (B, T), which of them count (B, T), and the weight of each (B, T) or None."""

    indices: Tensor
    counts: Tensor
    weights: Tensor | None


def _bags(layer: nn.EmbeddingBag, inputs: Inputs) -> _Bags:
    named = inputs.named(layer)
    flat, offsets = cast(Tensor, named["input"]), cast(Tensor | None, named["offsets"])
    weights = cast(Tensor | None, named["per_sample_weights"])
    if offsets is None:
        indices, counts = flat, torch.ones_like(flat, dtype=torch.bool)
    else:
        ends = offsets.new_tensor([flat.shape[0]])
        bounds = offsets if layer.include_last_offset else torch.cat((offsets, ends))
        lengths = bounds.diff()
        position = torch.arange(int(lengths.max()), device=flat.device)
        counts = position < lengths.unsqueeze(1)
        place = torch.where(counts, bounds[:-1].unsqueeze(1) + position, 0)
        # Where no bag holds anything there is nothing to pick.
        indices = flat[place] if flat.numel() else place
        weights = None if weights is None else weights[place]
    if layer.padding_idx is not None:
        counts = counts & (indices != layer.padding_idx)
    return _Bags(indices, counts, weights)


def _sum_values(_: nn.EmbeddingBag, bags: _Bags, grad: Tensor) -> Tensor:
    share = bags.counts.to(grad.dtype) if bags.weights is None else widen(bags.weights).to(grad.dtype)
    return torch.where(bags.counts, share, 0).unsqueeze(-1) * grad.unsqueeze(1)


def _mean_values(_: nn.EmbeddingBag, bags: _Bags, grad: Tensor) -> Tensor:
    share = bags.counts.to(grad.dtype) / bags.counts.sum(1, keepdim=True).clamp_min(1)
    return share.unsqueeze(-1) * grad.unsqueeze(1)


def _max_values(layer: nn.EmbeddingBag, bags: _Bags, grad: Tensor) -> Tensor:
    rows = layer.weight.detach()[bags.indices].masked_fill(~bags.counts.unsqueeze(-1), -torch.inf)
    if not rows.shape[1]:
        return grad.new_zeros(rows.shape)
    values = grad.new_zeros(rows.shape).scatter_(1, rows.argmax(1, keepdim=True), grad.unsqueeze(1))
    return values * bags.counts.unsqueeze(-1)


_VALUES: dict[str, Callable[[nn.EmbeddingBag, _Bags, Tensor], Tensor]] = {
    "sum": _sum_values,
    "mean": _mean_values,
    "max": _max_values,
}


def bag_batch_dims(layer: nn.Module, inputs: Inputs, outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Dimension 0: one bag is one example; raises where the table looks at the whole batch."""
    assert isinstance(layer, nn.EmbeddingBag)
    refuse_batch_statistics(layer)
    return batch_first(layer, inputs, outputs)


@rule(nn.EmbeddingBag, parameters=("weight",), batch_dims=bag_batch_dims)
def embedding_bag(layer: nn.Module, inputs: Inputs, grads: Sequence[Tensor | None]) -> dict[str, SampleGrads]:
    """`nn.EmbeddingBag` of bags (B, T), or of one row of indices with offsets; sum, mean and max."""
    assert isinstance(layer, nn.EmbeddingBag)
    (grad,) = grads
    assert grad is not None
    bags = _bags(layer, inputs)
    return {"weight": Rows(bags.indices, _VALUES[layer.mode](layer, bags, widen(grad)), layer.num_embeddings)}
