# SPDX-License-Identifier: Apache-2.0
"""`nn.MultiheadAttention`: outer products of the projections' output gradients and their inputs.

The layer's own forward and backward run as they are. The rule computes the attention again from its inputs with
the projected queries, keys and values as variables, and asks autograd for their gradients only: no weight
gradient is formed, and no module is run example by example.

Shapes: B examples, H heads, L queries, S keys, E width, K = 3 projections (queries, keys, values).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipping.errors import MixesExamples
from clipping.gradients.dense import Dense
from clipping.gradients.outer import Outer
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.norms import widen
from clipping.rules.registry import Inputs, rule, trainable


class _Projected(NamedTuple):
    """The variables of the attention: projections (B, L, E), (B, S, E), (B, S, E), added rows (B, 1, E)."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    key_row: Tensor | None
    value_row: Tensor | None


class _Given(NamedTuple):
    """The arguments of one call, batch first."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    attn_mask: Tensor | None
    key_padding_mask: Tensor | None
    need_weights: bool
    average: bool
    is_causal: bool


def attention_batch_dims(layer: nn.Module, inputs: Inputs, outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """The output has the batch where `batch_first` says, the attention weights in dimension 0."""
    assert isinstance(layer, nn.MultiheadAttention)
    if layer.training and layer.dropout > 0:
        raise MixesExamples(
            f"expected attention without dropout while training; got MultiheadAttention(dropout={layer.dropout}), "
            "whose masks the rule cannot draw again; build it with dropout=0.0, or set its `dropout` to 0 (in "
            "nn.TransformerEncoderLayer: layer.self_attn.dropout = 0.0), and keep nn.Dropout outside of it"
        )
    if outputs[0].dim() != 3:
        raise ValueError(
            "expected queries with a batch (B, L, E) or (L, B, E) at MultiheadAttention; got an output of shape "
            f"{tuple(outputs[0].shape)}, one example without a batch; call it with unsqueeze(0) and batch_first=True"
        )
    return (0 if layer.batch_first else 1, 0)[: len(outputs)]


def _given(layer: nn.MultiheadAttention, inputs: Inputs) -> _Given:
    named = inputs.named(layer)
    tensors = [cast(Tensor, named[name]) for name in ("query", "key", "value")]
    queries, keys, values = tensors if layer.batch_first else [x.transpose(0, 1) for x in tensors]
    attn_mask, padding = (
        cast(Tensor | None, named["attn_mask"]),
        cast(Tensor | None, named["key_padding_mask"]),
    )
    need, average = bool(named["need_weights"]), bool(named["average_attn_weights"])
    causal = bool(named["is_causal"])
    if causal and padding is None and not need:
        attn_mask = None  # torch then takes the mask for granted
    else:
        causal = False
    return _Given(queries, keys, values, attn_mask, padding, need, average, causal)


def _parameter(layer: nn.Module, name: str) -> Tensor | None:
    found = layer._parameters.get(name)
    return None if found is None else found.detach()


def _projected(layer: nn.MultiheadAttention, given: _Given) -> _Projected:
    packed, bias = _parameter(layer, "in_proj_weight"), _parameter(layer, "in_proj_bias")
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weights = [_parameter(layer, name) for name in names] if packed is None else packed.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    sources = (given.queries, given.keys, given.values)
    triples = zip(sources, weights, biases, strict=True)
    made = [F.linear(x, cast(Tensor, w), b).requires_grad_() for x, w, b in triples]
    rows: list[Tensor | None] = []
    for name in ("bias_k", "bias_v"):
        row = _parameter(layer, name)
        expand = None if row is None else row.to(made[0].dtype).repeat(len(made[0]), 1, 1)
        rows.append(None if expand is None else expand.requires_grad_())
    return _Projected(made[0], made[1], made[2], rows[0], rows[1])


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)


def _mask(layer: nn.MultiheadAttention, given: _Given, dtype: torch.dtype, num_added: int) -> Tensor | None:
    """Both masks as one, to be added to the scores (B, H, L, S); rows that the layer adds are seen by all."""
    num_examples = given.queries.shape[0]
    total = None
    if given.attn_mask is not None:
        total = _additive(given.attn_mask, dtype)
        if total.dim() == 3:
            total = total.unflatten(0, (num_examples, layer.num_heads))
    if given.key_padding_mask is not None:
        padding = _additive(given.key_padding_mask, dtype)[:, None, None]
        total = padding if total is None else total + padding
    return None if total is None else F.pad(total, (0, num_added))


def _attention(
    layer: nn.MultiheadAttention, given: _Given, projected: _Projected
) -> tuple[Tensor, Tensor | None]:
    """(B, L, E) mixed values, and (B, L, S) or (B, H, L, S) weights where they are needed."""
    queries, keys, values, key_row, value_row = projected
    num_added = 0
    if key_row is not None and value_row is not None:
        keys, values, num_added = torch.cat((keys, key_row), 1), torch.cat((values, value_row), 1), 1
    if layer.add_zero_attn:
        keys, values, num_added = F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1)), num_added + 1
    queries, keys, values = (
        x.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for x in (queries, keys, values)
    )
    mask = _mask(layer, given, queries.dtype, num_added)
    if not given.need_weights:
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask, 0.0, given.is_causal)
        return mixed.transpose(1, 2).flatten(2), None
    scores = (queries * math.sqrt(1 / queries.shape[-1])) @ keys.mT
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    return mixed, weights.mean(1) if given.average else weights


def _same(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() == second.data_ptr() and (first.shape, first.stride()) == (
        second.shape,
        second.stride(),
    )


def _packed(given: _Given, grads: Sequence[Tensor], shape: torch.Size) -> Outer:
    """The gradient of `in_proj_weight`, whose three blocks have their own inputs, or share one."""
    sources = given.queries, given.keys, given.values
    if _same(sources[0], sources[1]) and _same(sources[1], sources[2]):
        return Outer(torch.cat(tuple(grads), -1).unsqueeze(1), sources[0].unsqueeze(1), shape)
    longest = max(x.shape[1] for x in grads)
    # A position that is not there adds an outer product of zeros.
    left, right = (
        torch.stack([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x in side], 1) for side in (grads, sources)
    )
    return Outer(left, right, shape)


def _sum_over_positions(grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([widen(x).sum(1) for x in grads], -1)


def _in_projections(
    layer: nn.MultiheadAttention, given: _Given, grads: Sequence[Tensor]
) -> dict[str, SampleGrads]:
    found: dict[str, SampleGrads] = {}
    if trainable(layer, "in_proj_weight"):
        found["in_proj_weight"] = _packed(given, grads, cast(Tensor, layer.in_proj_weight).shape)
    if trainable(layer, "in_proj_bias"):
        found["in_proj_bias"] = Dense(_sum_over_positions(grads))
    sources = zip(("q", "k", "v"), grads, (given.queries, given.keys, given.values), strict=True)
    for letter, grad, values in sources:
        name = f"{letter}_proj_weight"
        if trainable(layer, name):
            shape = torch.Size((grad.shape[-1], values.shape[-1]))
            found[name] = Outer(grad.unsqueeze(1), values.unsqueeze(1), shape)
    return found


def _out_projection(layer: nn.MultiheadAttention, mixed: Tensor, grad: Tensor) -> dict[str, SampleGrads]:
    found: dict[str, SampleGrads] = {}
    if trainable(layer, "out_proj.weight"):
        found["out_proj.weight"] = Outer(grad.unsqueeze(1), mixed.unsqueeze(1), layer.out_proj.weight.shape)
    if trainable(layer, "out_proj.bias"):
        found["out_proj.bias"] = Dense(_sum_over_positions((grad,)))
    return found


_PARAMETERS = ("in_proj_*", "?_proj_weight", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias")


@rule(nn.MultiheadAttention, parameters=_PARAMETERS, batch_dims=attention_batch_dims)
def attention(layer: nn.Module, inputs: Inputs, grads: Sequence[Tensor | None]) -> dict[str, SampleGrads]:
    """`nn.MultiheadAttention` in every form without dropout: masks, weights, other key and value widths, biases."""
    assert isinstance(layer, nn.MultiheadAttention)
    given = _given(layer, inputs)
    grad, grad_weights = (*grads, None)[:2]
    projected = _projected(layer, given)
    variables = [x for x in projected if x is not None]
    with torch.enable_grad():
        mixed, weights = _attention(layer, given, projected)
    found: dict[str, SampleGrads] = {}
    sent: list[tuple[Tensor, Tensor]] = []
    if grad is not None:
        grad = grad if layer.batch_first else grad.transpose(0, 1)
        found.update(_out_projection(layer, mixed.detach(), grad))
        weight = layer.out_proj.weight.detach()
        sent.append((mixed, (grad.to(weight.dtype) @ weight).to(mixed.dtype)))
    if weights is not None and grad_weights is not None:
        sent.append((weights, grad_weights.to(weights.dtype)))
    outputs, cotangents = zip(*sent, strict=True)
    back = torch.autograd.grad(outputs, variables, cotangents, allow_unused=True, materialize_grads=True)
    found.update(_in_projections(layer, given, back[:3]))
    for name, rows in zip(("bias_k", "bias_v"), back[3:], strict=False):
        if trainable(layer, name):
            found[name] = Dense(rows.unsqueeze(1))
    return found
