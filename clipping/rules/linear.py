# SPDX-License-Identifier: Apache-2.0
"""Linear layers of any rank: gradient of the weight = sum over positions of output gradient times input.

Shapes: B examples, T positions (all dimensions between the first and the last), D inputs, P outputs.
"""

from __future__ import annotations

from torch import Tensor, nn

from clipping.gradients.dense import Dense
from clipping.gradients.outer import Outer
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.norms import as_multiplied, widen
from clipping.rules.registry import Inputs, rule


def _positions(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], 1, -1, values.shape[-1])


def bias_grads(grad: Tensor) -> Dense:
    """(B, ..., P) output gradient to the bias gradient (B, P)."""
    return Dense(widen(grad).reshape(grad.shape[0], -1, grad.shape[-1]).sum(1))


@rule(nn.Linear)
def linear(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """`nn.Linear` with input (B, ..., D) and output gradient (B, ..., P)."""
    found: dict[str, SampleGrads] = {}
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is not None and weight.requires_grad:
        given: Tensor = inputs.args[0] if inputs.args else inputs.first  # pyright: ignore[reportAssignmentType]
        if given.dtype != grad.dtype:
            given = as_multiplied(given, grad)
        found["weight"] = Outer(_positions(grad), _positions(given), weight.shape)
    if bias is not None and bias.requires_grad:
        found["bias"] = bias_grads(grad)
    return found


@rule("transformers.pytorch_utils.Conv1D")
def conv1d_transposed(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """transformers' `Conv1D`: a linear layer whose weight is stored as (D, P)."""
    found: dict[str, SampleGrads] = {}
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    if weight is not None and weight.requires_grad:
        found["weight"] = Outer(_positions(as_multiplied(inputs.first, grad)), _positions(grad), weight.shape)
    if bias is not None and bias.requires_grad:
        found["bias"] = bias_grads(grad)
    return found
