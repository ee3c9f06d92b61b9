# SPDX-License-Identifier: Apache-2.0
"""How a module without a rule is differentiated example by example, and where the batch is in its tensors.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, NamedTuple

from torch import Tensor, nn

from clipping.modules.generic_rule import batch_dim_of
from clipping.reruns.module_state import Held
from clipping.reruns.nested_values import is_floating
from clipping.reruns.one_example import BatchDims, Engine
from clipping.reruns.random_state import Sources
from clipping.reruns.reruns import ChildCall, Place

MOST_DOUBTED = 5
"""Inputs for which it is tried whether all examples share them."""


@dataclass(frozen=True, slots=True, eq=False)
class Manner:
    """What a trial has shown of one module, for calls of one kind.

    `own`: only the module's own code runs again, its children keep their rules, but for those that are `opened`.
    `engine` is None for a batch of one example, which runs again as it is. `dims` are those of its inputs and outputs,
    `children` those of what the children return and take, by kind of call. `places` are those of the parameters that
    the own code uses, `rows` how many rows of each input an example has. `mutated` are input leaves that it changes in place, `changed` tensors that it holds and changes,
    `copied` children whose outputs it changes in place, `stateful` whether it changes any attribute.
    """

    own: bool
    engine: Engine | None
    dims: BatchDims
    children: Mapping[tuple[int, int, int, int], BatchDims]
    called: tuple[nn.Module, ...]
    places: tuple[Place, ...]
    opened: tuple[nn.Module, ...]
    sources: Sources
    rows: tuple[float | None, ...] = ()
    mutated: tuple[int, ...] = ()
    changed: tuple[Held, ...] = ()
    copied: frozenset[int] = frozenset()
    stateful: bool = False
    proven: bool = True
    why: str = "one path"

    @property
    def names(self) -> frozenset[str]:
        """The parameters that the own code uses."""
        return frozenset(place.name for place in self.places)

    @property
    def is_batched(self) -> bool:
        """Whether every output was shown to have rows of the examples."""
        return bool(self.dims.outputs) and None not in self.dims.outputs

    def knows(self, calls: Sequence[ChildCall]) -> bool:
        """Whether a trial has seen every one of these calls."""
        return all(call.kind in self.children for call in calls)

    def dims_of(self, calls: Sequence[ChildCall]) -> BatchDims:
        """Where the batch is in all leaves and outputs of the own code."""
        below = [self.children[call.kind] for call in calls]
        inputs = (*self.dims.inputs, *(d for x in below for d in x.inputs))
        return BatchDims(inputs, (*self.dims.outputs, *(d for x in below for d in x.outputs)))


def children_dims(dims: BatchDims, calls: Sequence[ChildCall]) -> tuple[BatchDims, dict[Any, BatchDims]]:
    """All dims of the own code apart: the module's own, and those of each kind of call."""
    num_leaves, num_inputs = sum(x.num_leaves for x in calls), sum(x.num_inputs for x in calls)
    own = BatchDims(
        dims.inputs[: len(dims.inputs) - num_leaves], dims.outputs[: len(dims.outputs) - num_inputs]
    )
    leaves, inputs = iter(dims.inputs[len(own.inputs) :]), iter(dims.outputs[len(own.outputs) :])
    found = {}
    for call in calls:
        taken = tuple(next(inputs) for _ in range(call.num_inputs))
        found[call.kind] = BatchDims(tuple(next(leaves) for _ in range(call.num_leaves)), taken)
    return own, found


def leading(value: Tensor, batch_dim: int) -> int | None:
    """The size of the dimension in which a tensor of a model usually has its batch."""
    if value.dim() == 0:
        return None
    sequences = value.dim() > 2 or not is_floating(value)
    return value.shape[batch_dim if sequences and value.dim() > batch_dim else 0]


def examples_of(leaves: Sequence[object], hint: int | None, batch_dim: int) -> int | None:
    """How many examples a call is of, None where none of its tensors can hold a batch.

    Where the model's own batch is known, a call may hold several rows of each example.
    """
    sizes = [n for x in leaves if isinstance(x, Tensor) and (n := leading(x, batch_dim)) is not None]
    if hint is not None and any(n == hint for n in sizes):
        return hint
    if hint is not None and hint > 1 and any(n > hint and n % hint == 0 for n in sizes):
        return hint
    return sizes[0] if sizes else None


def _several(value: Tensor, num_examples: int, batch_dim: int) -> int | None:
    size = leading(value, batch_dim)
    if size is None or size <= num_examples or size % num_examples:
        return None
    return batch_dim if value.dim() > batch_dim and value.shape[batch_dim] == size else 0


def _only_other(value: Tensor, num_examples: int) -> int | None:
    dims = [dim for dim, size in enumerate(value.shape) if size == num_examples]
    return dims[0] if len(dims) == 1 else None


def _square(value: object, num_examples: int) -> bool:
    return isinstance(value, Tensor) and sum(size == num_examples for size in value.shape) > 1


class Size(NamedTuple):
    """How many examples a call is of, where a model has its batch, and where other calls had it in their inputs."""

    num_examples: int
    batch_dim: int
    alike: Sequence[tuple[int | None, ...]] = ()


def candidates(leaves: Sequence[object], num_inputs: int, size: Size) -> Iterator[tuple[int | None, ...]]:
    """Where the batch may be in each leaf, of which the first `num_inputs` are inputs; likeliest first.

    In doubt: tensors that all examples share although their size is that of the batch (a mask (T, T), one for each
    window), several rows for each example (windows), and another dimension (states (1, B, H)).
    """
    num_examples, batch_dim, alike = size
    seen = set()
    for others, several, squares in product((False, True), (True, False), (True, False)):
        found: list[int | None] = []
        for position, x in enumerate(leaves):
            dim = batch_dim_of(x, num_examples, batch_dim)
            if isinstance(x, Tensor):
                if dim is None and several:
                    dim = _several(x, num_examples, batch_dim)
                if dim is None and others:
                    dim = _only_other(x, num_examples)
                if position > 0 and not squares and _square(x, num_examples):
                    dim = None
            found.append(dim)
        known = [
            (*dims, *found[num_inputs:])
            for dims in alike
            if _possible(dims, leaves[:num_inputs], num_examples)
        ]
        for dims in (*known, *_shared(tuple(found), num_inputs)):
            if dims not in seen:
                seen.add(dims)
                yield dims


def _possible(dims: Sequence[int | None], leaves: Sequence[object], num_examples: int) -> bool:
    return len(dims) == len(leaves) and all(
        dim is None or (isinstance(x, Tensor) and x.dim() > dim and x.shape[dim] % num_examples == 0)
        for dim, x in zip(dims, leaves, strict=True)
    )


def _shared(dims: tuple[int | None, ...], num_inputs: int) -> Iterator[tuple[int | None, ...]]:
    """`dims`, then with more and more of the inputs after the first taken for shared."""
    batched = [i for i, dim in enumerate(dims[:num_inputs]) if dim is not None][1:]
    for size in range(len(batched) + 1 if len(batched) <= MOST_DOUBTED else 1):
        for chosen in combinations(batched, size):
            yield tuple(None if i in chosen else dim for i, dim in enumerate(dims))


def ratios(
    dims: Sequence[int | None], leaves: Sequence[object], num_examples: int
) -> tuple[float | None, ...]:
    """How many rows of each leaf an example has; None where the leaf is shared, or has no such dimension."""
    pairs = zip(leaves, dims, strict=True)
    return tuple(
        x.shape[d] / num_examples if d is not None and isinstance(x, Tensor) and x.dim() > d else None
        for x, d in pairs
    )
