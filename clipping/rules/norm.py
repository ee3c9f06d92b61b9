# SPDX-License-Identifier: Apache-2.0
"""Normalisation layers: gradient of the scale = output gradient times normalised input, summed over positions.

Only norms that look at one example at a time are here; BatchNorm mixes examples and is refused by `examine`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipping.grads import Dense, SampleGrads, widen
from clipping.rules.registry import Inputs, register_rule


def _trainable(layer: nn.Module, name: str) -> bool:
    parameter = layer._parameters.get(name)
    return parameter is not None and parameter.requires_grad


def _over_positions(values: Tensor, shape: torch.Size) -> Tensor:
    return values.reshape(values.shape[0], -1, *shape).sum(1)


def _affine(layer: nn.Module, grad: Tensor, normalised: Tensor, shape: torch.Size) -> dict[str, SampleGrads]:
    found: dict[str, SampleGrads] = {}
    grad = widen(grad)
    if _trainable(layer, "weight"):
        found["weight"] = Dense(_over_positions(grad * normalised, shape))
    if _trainable(layer, "bias"):
        found["bias"] = Dense(_over_positions(grad, shape))
    return found


def layer_norm(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """`nn.LayerNorm`, with or without bias."""
    assert isinstance(layer, nn.LayerNorm)
    shape = torch.Size(layer.normalized_shape)
    normalised = F.layer_norm(widen(inputs.first), shape, None, None, layer.eps)
    return _affine(layer, grad, normalised, shape)


def rms_norm(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """`nn.RMSNorm`."""
    assert isinstance(layer, nn.RMSNorm)
    shape = torch.Size(layer.normalized_shape)
    eps = torch.finfo(inputs.first.dtype).eps if layer.eps is None else layer.eps
    normalised = F.rms_norm(widen(inputs.first), shape, None, eps)
    return _affine(layer, grad, normalised, shape)


def transformers_rms_norm(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """The root-mean-square norms of transformers that scale by `weight` after normalising the last dimension."""
    weight = layer._parameters["weight"]
    assert weight is not None
    eps: float = getattr(layer, "variance_epsilon")  # noqa: B009 - not an attribute nn.Module declares
    # transformers normalises in float32 whatever the dtype, and scales the rounded result.
    normalised = F.rms_norm(inputs.first.float(), weight.shape, None, eps).to(inputs.first.dtype)
    return _affine(layer, grad, widen(normalised), weight.shape)


def group_norm(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """`nn.GroupNorm` on (B, C, ...)."""
    assert isinstance(layer, nn.GroupNorm)
    normalised = F.group_norm(widen(inputs.first), layer.num_groups, None, None, layer.eps)
    return _channels(layer, grad, normalised)


def _channels(layer: nn.Module, grad: Tensor, normalised: Tensor) -> dict[str, SampleGrads]:
    found: dict[str, SampleGrads] = {}
    grad = widen(grad).flatten(2) if grad.dim() > 2 else widen(grad).unsqueeze(-1)
    if _trainable(layer, "weight"):
        found["weight"] = Dense((grad * normalised.view_as(grad)).sum(2))
    if _trainable(layer, "bias"):
        found["bias"] = Dense(grad.sum(2))
    return found


register_rule(nn.LayerNorm, layer_norm)
register_rule(nn.RMSNorm, rms_norm, parameters=("weight",))
register_rule(nn.GroupNorm, group_norm)
for _model, _class in (
    ("llama", "LlamaRMSNorm"),
    ("mistral", "MistralRMSNorm"),
    ("mixtral", "MixtralRMSNorm"),
    ("qwen2", "Qwen2RMSNorm"),
    ("qwen3", "Qwen3RMSNorm"),
    ("phi3", "Phi3RMSNorm"),
    ("t5", "T5LayerNorm"),
):
    register_rule(
        f"transformers.models.{_model}.modeling_{_model}.{_class}",
        transformers_rms_norm,
        parameters=("weight",),
    )
