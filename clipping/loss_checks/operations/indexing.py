# SPDX-License-Identifier: Apache-2.0
"""Rules of indexing with tensors, and of products of matrices.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipping.loss_checks.operations.arithmetic import elementwise
from clipping.loss_checks.operations.layout import Layout, Shape, selected
from clipping.loss_checks.operations.state import (
    ONE,
    Alone,
    Facts,
    Operation,
    Rows,
    State,
    Total,
    Unproven,
    unproven,
)

_CHOICE = "a choice among the examples of the batch"


def indexed(facts: Facts, operation: Operation) -> State:
    """`x[i, j]` with tensors for indices; `index_select` is one in dimension `dim`."""
    state, shape = operation.states[0], operation.shapes[0]
    facts.repeatable = False
    given = _indices(operation)
    places = [dim for dim, index in enumerate(given) if isinstance(index, Tensor)]
    masks = [d for d in places if given[d].dtype in (torch.bool, torch.uint8)]  # pyright: ignore
    if isinstance(state, Unproven) or not places:
        return state
    if masks:
        return masked(facts, operation)
    if shape is None or state is None:
        return _looked_up(operation, places[0])
    if not isinstance(state, Rows):
        return state if isinstance(state, Alone) else Total(state.factors)
    if state.layout.dim not in places:
        return Rows(state.layout.at(_moved(state.layout.dim, given, places)), state.factor)
    return _rows_chosen(facts, operation, state, given, places)


def assigned(facts: Facts, operation: Operation) -> State:
    """`x[mask] = constant`, elementwise; any other assignment to chosen places is not followed."""
    facts.repeatable = False
    given = _indices(operation)
    places = [dim for dim, index in enumerate(given) if isinstance(index, Tensor)]
    mask = given[places[0]] if len(places) == 1 else None
    values = operation.get("values")
    constant = not isinstance(values, Tensor) or values.numel() == 1
    for state in operation.states:
        if isinstance(state, Unproven):
            return state
    if any(isinstance(state, Total) for state in operation.states) or operation.get("accumulate") is True:
        return unproven(operation, "a sum over examples of the batch, written to chosen places")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not constant or places != [0]:
        return unproven(operation, "an assignment to chosen places", shown=False)
    left = (*mask.shape, *(1 for _ in operation.out[mask.dim() :]))
    shapes = tuple(left if s is not None and s == tuple(mask.shape) else s for s in operation.shapes)
    return elementwise(facts, operation._replace(shapes=shapes))


def _indices(operation: Operation) -> list[object]:
    indices, index = operation.get("indices"), operation.get("index")
    if isinstance(indices, Sequence):
        return list(indices)
    dim = operation.get("dim")
    size = len(operation.shapes[0] or operation.out)
    return [
        index if d == int(dim if isinstance(dim, int) else 0) % max(1, size) else None for d in range(size)
    ]


def masked(_: Facts, operation: Operation) -> State:
    """A selection whose number of elements depends on the batch."""
    if all(state is None for state in operation.states):
        return None
    return unproven(
        operation, _CHOICE + " or of their positions, whose number depends on the batch", shown=False
    )


def looked_up(_: Facts, operation: Operation) -> State:
    """`embedding`: rows of a constant table."""
    return _looked_up(operation, 0)


def _looked_up(operation: Operation, at: int) -> State:
    """Rows of a constant table, chosen by indices of the examples."""
    if operation.states[0] is not None:
        return unproven(operation, _CHOICE)
    known = [state for state in operation.states[1:] if state is not None]
    if not known:
        return None
    if len(known) > 1 and len(set(map(str, known))) > 1:
        return unproven(operation, "indices of different examples", shown=False)
    found = known[0]
    if isinstance(found, Rows):
        return Rows(found.layout.at(found.layout.dim + at))
    return Alone(dict.fromkeys(found.factors, ONE)) if isinstance(found, Alone) else found


def _adjacent(places: list[int]) -> bool:
    return places[-1] - places[0] + 1 == len(places)


def _moved(dim: int, given: list[object], places: list[int]) -> int:
    """Where a dimension that is not indexed goes."""
    num_dims = max(x.dim() for x in given if isinstance(x, Tensor))
    if _adjacent(places):
        return dim if dim < places[0] else dim - len(places) + num_dims
    return num_dims + dim - sum(d < dim for d in places)


def _rows_chosen(
    facts: Facts, operation: Operation, state: Rows, given: list[object], places: list[int]
) -> State:
    index = given[state.layout.dim]
    assert isinstance(index, Tensor)
    long = [d for d, size in enumerate(index.shape) if size != 1]
    if len(long) > 1:
        return unproven(operation, _CHOICE)
    layout = selected(state.layout, facts.num_examples, index.flatten())
    if layout is None:
        return unproven(operation, _CHOICE)
    widest = max(x.dim() for x in given if isinstance(x, Tensor))
    inside = (long[0] if long else 0) + widest - index.dim()
    at = inside + (places[0] if _adjacent(places) else 0)
    others = [s for s in operation.states[1:] if isinstance(s, Rows)]
    if any(s.layout.order != layout.order for s in others):
        return unproven(operation, "indices of different examples")
    return Rows(layout.at(at), state.factor)


def distances(facts: Facts, operation: Operation) -> State:
    """`cdist` of (..., P, D) and (..., R, D): as the product of the first and the second transposed."""
    left, right = operation.states[:2]
    a, b = operation.shapes[:2]
    if isinstance(right, Rows) and b is not None:
        last = len(b) - 1
        swapped = {last: last - 1, last - 1: last}
        right = Rows(right.layout.at(swapped.get(right.layout.dim, right.layout.dim)), right.factor)
        b = (*b[:-2], b[-1], b[-2])
    for state in (left, right):
        if isinstance(state, Rows):
            facts.settled(state.factor)
    found = matrix_product(facts, operation._replace(states=(left, right), shapes=(a, b)))
    if isinstance(found, Total):
        return unproven(operation, "distances over the examples of the batch")
    return Rows(found.layout) if isinstance(found, Rows) else found


def matrix_product(facts: Facts, operation: Operation) -> State:
    """`mm`, `bmm`, `mv`, `dot`; with a summand before them, `addmm`, `baddbmm`, `addmv`."""
    skip = len(operation.states) - 2
    left, right = operation.states[skip:]
    a, b = operation.shapes[skip:]
    summand = operation.states[0] if skip else None
    for state in (left, right, summand):
        if isinstance(state, Unproven):
            return state
    if left is None and right is None:
        return summand
    if summand is not None or not all(x is None or isinstance(x, Rows) for x in (left, right)):
        return unproven(operation, "a product of matrices of which one is a sum over examples", shown=False)
    return _product(operation, left, right, a, b)  # pyright: ignore[reportArgumentType]


def _product(
    operation: Operation, left: Rows | None, right: Rows | None, a: Shape | None, b: Shape | None
) -> State:
    kept = _kept(left.layout, a, first=True) if left is not None and a is not None else None
    if right is not None and b is not None:
        other = _kept(right.layout, b, first=False)
        if left is None:
            kept = other
        elif kept != other or kept is None:
            return _paired(operation, left, right, kept, other)
    factor = ONE.times(left.factor if left else ONE).times(right.factor if right else ONE)
    return Total((factor,)) if kept is None else Rows(kept, factor)


def _paired(
    operation: Operation, left: Rows, right: Rows, kept: Layout | None, other: Layout | None
) -> State:
    same = left.layout._replace(dim=0) == right.layout._replace(dim=0)
    if kept is None and other is None and same:
        return Total((left.factor.times(right.factor),))
    return unproven(operation, "a product that compares the examples with each other")


def _kept(layout: Layout, shape: Shape, *, first: bool) -> Layout | None:
    """Where the examples are in a product, None where it adds them up."""
    last = len(shape) - 1
    inner = last if first else max(0, last - 1)
    if layout.dim == inner:
        return None
    if len(shape) < 3 and not first:
        return layout.at(1)
    return layout
