# SPDX-License-Identifier: Apache-2.0
"""Convolutions of one, two and three dimensions, as outer products over output positions.

Shapes: B examples, K channel groups, C input channels, T output positions, P outputs per group,
D = C / K * kernel elements.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from clipping.grads import Dense, SampleGrads, widen
from clipping.outer import Outer
from clipping.rules.registry import Inputs, register_rule


def _padded(layer: _ConvNd, values: Tensor) -> Tensor:
    # torch computes these pads for integers, "same" and "valid" alike, last dimension first.
    pads = tuple(layer._reversed_padding_repeated_twice)
    if not any(pads):
        return values
    if layer.padding_mode == "zeros":
        return F.pad(values, pads)
    return F.pad(values, pads, mode=layer.padding_mode)


def patches(layer: _ConvNd, values: Tensor) -> Tensor:
    """(B, C, ...) input to the patches (B, K, T, D) that each output position saw."""
    values = _padded(layer, values)
    num_dims = values.dim() - 2
    for dim in range(num_dims):
        kernel, stride, dilation = layer.kernel_size[dim], layer.stride[dim], layer.dilation[dim]
        values = values.unfold(2 + dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    num_examples, num_channels = values.shape[:2]
    grouped = values.unflatten(1, (layer.groups, num_channels // layer.groups))
    positions = list(range(3, 3 + num_dims))
    kernel_dims = list(range(3 + num_dims, 3 + 2 * num_dims))
    # Positions last while copying: the inner loop then runs along a row of the image.
    ordered = grouped.permute(0, 1, 2, *kernel_dims, *positions)
    num_positions = math.prod(ordered.shape[3 + num_dims :])
    width = num_channels // layer.groups * math.prod(layer.kernel_size)
    return ordered.reshape(num_examples, layer.groups, width, num_positions).mT


def convolution(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with any groups, stride, dilation, padding and padding mode."""
    assert isinstance(layer, _ConvNd)
    found: dict[str, SampleGrads] = {}
    flat = grad.flatten(2)
    if layer.weight.requires_grad:
        left = flat.unflatten(1, (layer.groups, -1)).mT
        found["weight"] = Outer(left, patches(layer, inputs.first), layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        found["bias"] = Dense(widen(flat).sum(2))
    return found


for _layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_rule(_layer, convolution)
