# SPDX-License-Identifier: Apache-2.0
"""Where the examples are in a batch as the loader hands it out.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.utils import _pytree as pytree

from clipping.loss_checks.layout import Layout
from clipping.loss_checks.state import ONE, Alone, Rows, State
from clipping.rules.generic import batch_dim_of


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
    rows = [(x, batch_dim_of(x, num_examples, batch_dim)) for x in tensors(batch)]
    if not listed:
        yield from ((x, None if dim is None else Rows(Layout(dim))) for x, dim in rows)
    elif any(dim is None for _, dim in rows):
        assert isinstance(batch, list | tuple)
        yield from ((x, Alone({i: ONE})) for i, example in enumerate(batch) for x in tensors(example))
