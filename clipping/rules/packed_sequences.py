# SPDX-License-Identifier: Apache-2.0
"""Packed sequences: batches without padding, whose rows are the positions of all examples, mixed up.

Shapes: B examples, T positions, P numbers of a position.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from clipping.rules.registry import Inputs


def packed_input(inputs: Inputs) -> PackedSequence | None:
    """The packed sequence among the arguments of a call."""
    found = (x for x in (*inputs.args, *inputs.kwargs.values()) if isinstance(x, PackedSequence))
    return next(found, None)


def padded(like: PackedSequence, values: Tensor) -> Tensor:
    """(T, B, P): `values`, packed as `like` is, with zeros where a sequence has ended; examples in their own order."""
    packed = PackedSequence(values, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
    return pad_packed_sequence(packed)[0]


def padded_gradients(inputs: Inputs, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The output gradients of a recurrent layer, that of a packed output as (T, B, P)."""
    packed = packed_input(inputs)
    if packed is None or grads[0] is None:
        return grads
    return (padded(packed, grads[0]), *grads[1:])
