# SPDX-License-Identifier: Apache-2.0
"""Bilinear layers: the gradient of the weight is a sum of outer products of three vectors.

Shapes: B examples, T positions, C and D inputs of the first and the second argument, P outputs.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from clipping.gradients.outer import Outer
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.norms import widen
from clipping.rules.linear import bias_grads
from clipping.rules.registry import Inputs, rule, trainable


def _paired(first: Tensor, second: Tensor) -> Tensor:
    """(B, 1, T, C * D) from (B, 1, T, C) and (B, 1, T, D)."""
    return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)


@rule(nn.Bilinear)
def bilinear(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """`nn.Bilinear` with inputs (B, ..., C) and (B, ..., D) and output gradient (B, ..., P)."""
    assert isinstance(layer, nn.Bilinear)
    named = inputs.named(layer)
    tensors = (grad, cast(Tensor, named["input1"]), cast(Tensor, named["input2"]))
    outputs, first, second = (widen(x).reshape(len(x), 1, -1, x.shape[-1]) for x in tensors)
    found: dict[str, SampleGrads] = {}
    if trainable(layer, "weight"):
        num_out, num_first, num_second = layer.weight.shape
        # Either pairing means the same gradient; one of them holds fewer numbers.
        if num_first * num_second + num_out <= num_out * num_first + num_second:
            found["weight"] = Outer(outputs, _paired(first, second), layer.weight.shape)
        else:
            found["weight"] = Outer(_paired(outputs, first), second, layer.weight.shape)
    if trainable(layer, "bias"):
        found["bias"] = bias_grads(grad)
    return found
