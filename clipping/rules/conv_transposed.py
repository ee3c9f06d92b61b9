# SPDX-License-Identifier: Apache-2.0
"""Transposed convolutions: inputs and output gradients change places with those of a convolution.

Shapes: B examples, C output channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from clipping.gradients.convolved import Convolved, Geometry
from clipping.gradients.dense import Dense
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.norms import widen
from clipping.rules.conv import convolution_batch_dims
from clipping.rules.registry import Inputs, rule, trainable


def _seen(layer: _ConvTransposeNd, grad: Tensor, positions: Sequence[int]) -> Tensor:
    """(B, C, ...) output gradient, padded and cut to what the input positions reached."""
    pads: list[int] = []
    for dim in range(len(positions)):
        pad, kernel = int(layer.padding[dim]), layer.kernel_size[dim]
        reach = (positions[dim] - 1) * layer.stride[dim] + layer.dilation[dim] * (kernel - 1) + 1
        # Negative where output_padding made outputs that no input reached: F.pad then cuts.
        pads[:0] = [pad, reach - pad - grad.shape[2 + dim]]
    return F.pad(grad, pads)


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, batch_dims=convolution_batch_dims)
def transposed_convolution(
    layer: nn.Module, inputs: Inputs, grads: Sequence[Tensor | None]
) -> dict[str, SampleGrads]:
    """`nn.ConvTranspose1d`, `2d`, `3d` with any groups, stride, padding, output padding and dilation."""
    assert isinstance(layer, _ConvTransposeNd)
    (grad,), values = grads, inputs.first
    assert grad is not None
    found: dict[str, SampleGrads] = {}
    if trainable(layer, "weight"):
        zeros = (0,) * len(layer.kernel_size)
        geometry = Geometry(layer.kernel_size, layer.stride, zeros, layer.dilation, layer.groups)
        seen = _seen(layer, grad, values.shape[2:])
        found["weight"] = Convolved(seen, values, layer.weight.shape, geometry)
    if trainable(layer, "bias"):
        found["bias"] = Dense(widen(grad).flatten(2).sum(2))
    return found
