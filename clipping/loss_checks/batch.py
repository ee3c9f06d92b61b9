# SPDX-License-Identifier: Apache-2.0
"""Where the examples are in a batch as the loader hands it out.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.utils import _pytree as pytree

from clipping.loss_checks.operations.layout import Layout
from clipping.loss_checks.operations.state import ONE, Alone, Rows, State
from clipping.modules.generic_rule import batch_dim_of


def tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in nested containers, mappings of any class included (such as a tokenizer's)."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from tensors(dict(leaf))


def handed_out(batch: object, num_examples: int, batch_dim: int) -> Iterator[tuple[Tensor, State]]:
    """The tensors of a batch with what is known of each: rows of all examples, or in a list of examples that of one."""
    listed = isinstance(batch, list | tuple) and len(batch) == num_examples
    if not listed:
        for x in tensors(batch):
            dim = batch_dim_of(x, num_examples, batch_dim)
            yield x, None if dim is None else Rows(Layout(dim))
    elif isinstance(batch, list | tuple) and not all(
        _can_be_all(part, num_examples, batch_dim) for part in batch
    ):
        yield from ((x, Alone({i: ONE})) for i, example in enumerate(batch) for x in tensors(example))


def _can_be_all(part: object, num_examples: int, batch_dim: int) -> bool:
    """Whether a part of a batch can be that of all examples: rows, or a list with one for each."""
    if isinstance(part, list | tuple) and len(part) == num_examples:
        return True
    return all(batch_dim_of(x, num_examples, batch_dim) is not None for x in tensors(part))
