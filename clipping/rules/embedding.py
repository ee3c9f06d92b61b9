# SPDX-License-Identifier: Apache-2.0
"""Embeddings: the output gradient of each position belongs to the row that was looked up.

Shapes: B examples, T positions, D width, V rows.
"""

from __future__ import annotations

from torch import Tensor, nn

from clipping.gradients.rows import Rows
from clipping.gradients.sample_grads import SampleGrads
from clipping.rules.registry import Inputs, rule


def refuse_batch_statistics(layer: nn.Embedding | nn.EmbeddingBag) -> None:
    """Raise ValueError where the table or its gradient depends on which indices the whole batch holds."""
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        raise ValueError(
            "expected an embedding without max_norm and scale_grad_by_freq, which depend on the whole batch; "
            f"got {layer}; build it without them"
        )


@rule(nn.Embedding, parameters=("weight",))
def embedding(layer: nn.Module, inputs: Inputs, grad: Tensor) -> dict[str, SampleGrads]:
    """`nn.Embedding` with indices (B, ...) and output gradient (B, ..., D); `padding_idx` gets no gradient."""
    assert isinstance(layer, nn.Embedding)
    refuse_batch_statistics(layer)
    num_examples = grad.shape[0]
    indices = inputs.first.reshape(num_examples, -1)
    values = grad.reshape(num_examples, indices.shape[1], grad.shape[-1])
    if layer.padding_idx is not None:
        values = values.masked_fill((indices == layer.padding_idx).unsqueeze(-1), 0)
    return {"weight": Rows(indices, values, layer.num_embeddings)}
