# SPDX-License-Identifier: Apache-2.0
"""Normalisation layers: gradient of the scale = output gradient times normalised input, summed over positions.

Only norms that look at one example at a time are here; BatchNorm mixes examples and is refused by `examine`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from clipping.gradients.dense import Dense
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.norms import widen
from clipping.rules.registry import Inputs, batch_first, require_dims, rule, trainable

_TRANSFORMERS = tuple(
    f"transformers.models.{model}.modeling_{model}.{name}"
    for model, name in (
        ("llama", "LlamaRMSNorm"),
        ("mistral", "MistralRMSNorm"),
        ("mixtral", "MixtralRMSNorm"),
        ("qwen2", "Qwen2RMSNorm"),
        ("qwen2_moe", "Qwen2MoeRMSNorm"),
        ("qwen3", "Qwen3RMSNorm"),
        ("qwen3_moe", "Qwen3MoeRMSNorm"),
        ("phi3", "Phi3RMSNorm"),
        ("t5", "T5LayerNorm"),
    )
)


def _over_positions(values: Tensor, shape: torch.Size) -> Tensor:
    return values.reshape(values.shape[0], -1, *shape).sum(1)


def _affine(layer: nn.Module, grad: Tensor, normalised: Tensor, shape: torch.Size) -> dict[str, SampleGrads]:
    found: dict[str, SampleGrads] = {}
    grad = widen(grad)
    if trainable(layer, "weight"):
        found["weight"] = Dense(_over_positions(grad * normalised, shape))
    if trainable(layer, "bias"):
        found["bias"] = Dense(_over_positions(grad, shape))
    return found


@rule(nn.LayerNorm)
def layer_norm(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """`nn.LayerNorm`, with or without bias."""
    assert isinstance(layer, nn.LayerNorm)
    shape = torch.Size(layer.normalized_shape)
    normalised = F.layer_norm(widen(inputs.first), shape, None, None, layer.eps)
    return _affine(layer, grad, normalised, shape)


@rule(nn.RMSNorm, parameters=("weight",))
def rms_norm(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """`nn.RMSNorm`."""
    assert isinstance(layer, nn.RMSNorm)
    shape = torch.Size(layer.normalized_shape)
    eps = torch.finfo(inputs.first.dtype).eps if layer.eps is None else layer.eps
    normalised = F.rms_norm(widen(inputs.first), shape, None, eps)
    return _affine(layer, grad, normalised, shape)


@rule(*_TRANSFORMERS, parameters=("weight",))
def transformers_rms_norm(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """The root-mean-square norms of transformers that scale by `weight` after normalising the last dimension."""
    weight = layer._parameters["weight"]
    assert weight is not None
    eps: float = getattr(layer, "variance_epsilon")  # noqa: B009 - not an attribute nn.Module declares
    # transformers normalises in float32 whatever the dtype, and scales the rounded result.
    normalised = F.rms_norm(inputs.first.float(), weight.shape, None, eps).to(inputs.first.dtype)
    return _affine(layer, grad, widen(normalised), weight.shape)


@rule(nn.GroupNorm, batch_dims=batch_first)
def group_norm(layer: nn.Module, inputs: Inputs, grads: Sequence[Tensor | None]) -> dict[str, SampleGrads]:
    """`nn.GroupNorm` on (B, C, ...)."""
    assert isinstance(layer, nn.GroupNorm)
    normalised = F.group_norm(widen(inputs.first), layer.num_groups, None, None, layer.eps)
    return _channels(layer, grads, normalised)


def instance_batch_dims(layer: nn.Module, inputs: Inputs, outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Dimension 0; raises for inputs without a batch, whose channels would pass for examples."""
    assert isinstance(layer, _InstanceNorm)
    require_dims(layer, inputs, layer._get_no_batch_dim() + 1)
    return batch_first(layer, inputs, outputs)


@rule(_InstanceNorm, batch_dims=instance_batch_dims)  # its three classes share its forward
def instance_norm(layer: nn.Module, inputs: Inputs, grads: Sequence[Tensor | None]) -> dict[str, SampleGrads]:
    """`nn.InstanceNorm1d`, `2d`, `3d` without running statistics, which `examine` refuses."""
    assert isinstance(layer, _InstanceNorm)
    normalised = F.instance_norm(widen(inputs.first), eps=layer.eps)
    return _channels(layer, grads, normalised)


def _channels(layer: nn.Module, grads: Sequence[Tensor | None], normalised: Tensor) -> dict[str, SampleGrads]:
    (grad,) = grads
    assert grad is not None
    found: dict[str, SampleGrads] = {}
    grad = widen(grad).flatten(2) if grad.dim() > 2 else widen(grad).unsqueeze(-1)
    if trainable(layer, "weight"):
        found["weight"] = Dense((grad * normalised.view_as(grad)).sum(2))
    if trainable(layer, "bias"):
        found["bias"] = Dense(grad.sum(2))
    return found
