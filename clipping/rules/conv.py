# SPDX-License-Identifier: Apache-2.0
"""Convolutions of one, two and three dimensions.

Shapes: B examples, C input channels, T output positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from clipping.gradients.convolved import Convolved, Geometry
from clipping.gradients.dense import Dense
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.norms import widen
from clipping.rules.registry import Inputs, batch_first, require_dims, rule, trainable


def _padded(layer: _ConvNd, values: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with the padding that a plain convolution cannot express, and the padding that is left to it."""
    # torch computes these pads for integers, "same" and "valid" alike, last dimension first.
    pads = tuple(layer._reversed_padding_repeated_twice)
    none = (0,) * len(layer.kernel_size)
    if not any(pads):
        return values, none
    if layer.padding_mode != "zeros":
        return F.pad(values, pads, mode=layer.padding_mode), none
    before, after = pads[::2], pads[1::2]
    if before == after:
        return values, tuple(reversed(before))
    return F.pad(values, pads), none


def convolution_batch_dims(layer: nn.Module, inputs: Inputs, outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Dimension 0, after refusing a single example without a batch, which convolutions take too."""
    kernel_size: tuple[int, ...] = layer.kernel_size  # pyright: ignore[reportAssignmentType]
    require_dims(layer, inputs, len(kernel_size) + 2)
    return batch_first(layer, inputs, outputs)


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, batch_dims=convolution_batch_dims)
def convolution(layer: nn.Module, inputs: Inputs, grads: Sequence[Tensor | None]) -> dict[str, SampleGrads]:
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` with any groups, stride, dilation, padding and padding mode."""
    assert isinstance(layer, _ConvNd)
    (grad,) = grads
    assert grad is not None
    found: dict[str, SampleGrads] = {}
    if trainable(layer, "weight"):
        values, padding = _padded(layer, inputs.first)
        geometry = Geometry(layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups)
        found["weight"] = Convolved(values, grad, layer.weight.shape, geometry)
    if trainable(layer, "bias"):
        found["bias"] = Dense(widen(grad).flatten(2).sum(2))
    return found
