# SPDX-License-Identifier: Apache-2.0
"""Activations with parameters.

Shapes: B examples, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from clipping.gradients.dense import Dense
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.norms import widen
from clipping.rules.registry import Inputs, rule


@rule(nn.PReLU, parameters=("weight",))
def prelu(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """`nn.PReLU`: the slope of all channels, or one for each channel in dimension 1."""
    assert isinstance(layer, nn.PReLU)
    if layer.num_parameters > 1 and grad.shape[1] != layer.num_parameters:
        raise ValueError(
            f"expected channels in dimension 1 at PReLU({layer.num_parameters}); got {tuple(grad.shape)} with the batch "
            "first; use one slope for all channels, or move the channels beside the batch"
        )
    products = widen(grad) * widen(inputs.first).clamp_max(0)
    num_channels = layer.num_parameters
    return {"weight": Dense(products.reshape(len(grad), num_channels, -1).sum(2))}
