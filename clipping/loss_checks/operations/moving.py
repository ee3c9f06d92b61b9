# SPDX-License-Identifier: Apache-2.0
"""Rules of operations that move elements: views, slices, selections, concatenations.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clipping.loss_checks.operations.arithmetic import complete, copied, copies, elementwise
from clipping.loss_checks.operations.layout import Layout, permuted, selected, sliced, viewed
from clipping.loss_checks.operations.state import (
    Alone,
    Factor,
    Facts,
    Operation,
    Rows,
    State,
    Total,
    Unproven,
    unproven,
)


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value


def viewed_as(facts: Facts, operation: Operation) -> State:
    """A reshape of any kind: elements keep their order."""
    state, shape = operation.states[0], operation.shapes[0]
    if not isinstance(state, Rows) or shape is None:
        return state
    layout = viewed(state.layout, facts.num_examples, shape, operation.out)
    return _rows(operation, layout, state.factor)


def _rows(operation: Operation, layout: Layout | None, factor: Factor) -> State:
    if layout is None:
        return unproven(operation, "a reshape that spreads the examples over several dimensions", shown=False)
    return Rows(layout, factor)


def permuted_by(_: Facts, operation: Operation) -> State:
    """`permute`, `transpose` or `t`."""
    state, shape = operation.states[0], operation.shapes[0]
    if not isinstance(state, Rows) or shape is None:
        return state
    dims = list(range(len(shape)))
    given = operation.get("dims")
    if isinstance(given, Sequence):
        dims = [int(d) for d in given]
    elif len(shape) > 1:
        a, b = operation.get("dim0"), operation.get("dim1")
        a, b = (0, 1) if a is None or b is None else (_number(a), _number(b))
        dims[a], dims[b] = dims[b], dims[a]
    return Rows(permuted(state.layout, dims), state.factor)


def expanded(facts: Facts, operation: Operation) -> State:
    """`expand`: copies of what is there."""
    state, shape = operation.states[0], operation.shapes[0]
    if isinstance(state, Total) and copied(operation):
        return copies(facts, operation)
    if not isinstance(state, Rows) or shape is None:
        return state
    layout = state.layout.at(state.layout.dim + len(operation.out) - len(shape))
    same = operation.out[layout.dim] == layout.size(facts.num_examples)
    return _rows(operation, layout if same else None, state.factor)


def repeated(facts: Facts, operation: Operation) -> State:
    """`repeat`: each example as often as the others."""
    state, shape = operation.states[0], operation.shapes[0]
    if not isinstance(state, Rows) or shape is None:
        return copies(facts, operation) if isinstance(state, Total) else state
    layout = state.layout.at(state.layout.dim + len(operation.out) - len(shape))
    times = operation.out[layout.dim] // layout.size(facts.num_examples)
    return Rows(layout._replace(outer=layout.outer * times), state.factor)


def part_of(facts: Facts, operation: Operation) -> State:
    """`select`, `slice`, `split`, `unbind`: a part of one dimension."""
    state, shape = operation.states[0], operation.shapes[0]
    if not isinstance(state, Rows) or shape is None:
        return state if not isinstance(state, Total) else Total(state.factors)
    given = operation.get("dim")
    dim = _number(0 if given is None else given) % max(1, len(shape))
    layout, gone = state.layout, len(operation.out) < len(shape)
    if dim != layout.dim:
        return Rows(layout.at(layout.dim - (gone and dim < layout.dim)), state.factor)
    if gone:
        return _one(facts, operation, state, _index(operation))
    start, step = _start(operation, shape[dim]), operation.get("step")
    if operation.out[dim] == 1 and layout.size(facts.num_examples) == facts.num_examples > 1:
        return _one(facts, operation, state, start)
    found = sliced(layout, facts.num_examples, start, operation.out[dim])
    if found is None or step not in (None, 1):
        return unproven(operation, "a part of the examples, chosen by their place", shown=False)
    return Rows(found, state.factor)


def _index(operation: Operation) -> int:
    given = operation.get("index")
    return _number(given) if isinstance(given, int) else operation.which


def _one(facts: Facts, operation: Operation, state: Rows, index: int) -> State:
    owners = state.layout.owners(facts.num_examples)
    if len(owners) != facts.num_examples:
        return unproven(operation, "some of several rows of each example", shown=False)
    return Alone({int(owners[index]): state.factor})


def _start(operation: Operation, size: int) -> int:
    start, length = operation.get("start"), operation.get("split_size")
    if isinstance(length, int):
        return operation.which * length
    lengths = operation.get("split_sizes")
    if isinstance(lengths, Sequence):
        return sum(int(x) for x in lengths[: operation.which])
    return 0 if start is None else min(max(_number(start) + (size if _number(start) < 0 else 0), 0), size)


def concatenated(facts: Facts, operation: Operation) -> State:
    """`cat` and `stack`."""
    given = operation.get("dim")
    dim = _number(0 if given is None else given) % max(1, len(operation.out))
    states = operation.states
    for state in states:
        if isinstance(state, Unproven):
            return state
    if all(isinstance(state, Total) for state in states):
        return Total(tuple(f for state in states if isinstance(state, Total) for f in state.factors))
    if any(isinstance(state, Alone) for state in states):
        return _gathered(facts, operation, dim)
    if any(isinstance(state, Total) for state in states):
        return unproven(operation, "a sum over the examples beside what is not one", shown=False)
    stacking = operation.name == "stack"
    rows = [state for state in states if isinstance(state, Rows)]
    if not rows:
        return None
    places = {state.layout.at(state.layout.dim + (stacking and state.layout.dim >= dim)) for state in rows}
    if all(place.dim != dim for place in places):
        shapes = (operation.out,) * len(states)
        placed = tuple(
            state._replace(layout=state.layout.at(state.layout.dim + (stacking and state.layout.dim >= dim)))
            if isinstance(state, Rows)
            else state
            for state in states
        )
        return elementwise(facts, operation._replace(states=placed, shapes=shapes))
    return _lengthened(facts, operation, rows)


def _lengthened(facts: Facts, operation: Operation, rows: list[Rows]) -> State:
    first = rows[0]
    alike = {(x.layout.dim, x.layout.inner, x.layout.order) for x in rows}
    if len(rows) != len(operation.states) or len(alike) != 1:
        return unproven(operation, "rows of the examples beside rows of something else", shown=False)
    for state in rows:
        facts.settled(state.factor)
    return Rows(first.layout._replace(outer=sum(x.layout.outer for x in rows)))


def _gathered(facts: Facts, operation: Operation, dim: int) -> State:
    """Single examples put together again, each once."""
    examples: list[int] = []
    factors: dict[int, Factor] = {}
    for state in operation.states:
        if not isinstance(state, Alone) or not state.single:
            return unproven(operation, "single examples beside something else", shown=False)
        factors |= state.factors
        examples += state.factors
    num_examples = facts.num_examples
    if len(set(examples)) != len(examples):
        return unproven(operation, "a batch in which an example appears twice", shown=False)
    if operation.name != "stack" and operation.out[dim] != num_examples:
        return complete(facts, factors)  # ragged: only a sum of it makes sense
    if sorted(examples) == list(range(num_examples)) and len(set(factors.values())) == 1:
        index = torch.tensor(examples, device="cpu")
        layout = selected(Layout(dim), num_examples, index)
        return _rows(operation, layout, next(iter(factors.values())))
    return Alone(factors)


def padded(facts: Facts, operation: Operation) -> State:
    """`constant_pad_nd` along dimensions that are not the examples'."""
    state, shape = operation.states[0], operation.shapes[0]
    if not isinstance(state, Rows) or shape is None:
        return state
    if operation.out[state.layout.dim] != shape[state.layout.dim]:
        return unproven(operation, "rows of the examples beside rows of something else", shown=False)
    return state


def windows(_: Facts, operation: Operation) -> State:
    """`unfold`: windows of one dimension, their positions in a new last one."""
    state, shape = operation.states[0], operation.shapes[0]
    dim = operation.get("dim") if operation.get("dimension") is None else operation.get("dimension")
    if isinstance(state, Rows) and shape is not None and _number(dim) % len(shape) == state.layout.dim:
        return unproven(operation, "windows over the examples of the batch")
    return state


def moved(facts: Facts, operation: Operation) -> State:
    """`flip` and `roll`: along the examples they change places."""
    state, shape = operation.states[0], operation.shapes[0]
    if not isinstance(state, Rows) or shape is None:
        return state
    dims, shifts = operation.get("dims"), operation.get("shifts")
    places = [int(d) % len(shape) for d in dims] if isinstance(dims, Sequence) else []
    if places and state.layout.dim not in places:
        return state
    index = torch.arange(shape[state.layout.dim], device="cpu")
    if not isinstance(shifts, Sequence):
        index = index.flip(0)
    elif places:
        index = index.roll(int(shifts[places.index(state.layout.dim)]))
    layout = selected(state.layout, facts.num_examples, index) if places else None
    return _rows(operation, layout, state.factor)


def gathered(facts: Facts, operation: Operation) -> State:
    """`gather` along `dim`: elementwise in the other dimensions, or a table looked up for each example."""
    if operation.states[0] is None:
        return operation.states[1] if len(operation.states) > 1 else None
    return scattered(facts, operation)


def scattered(facts: Facts, operation: Operation) -> State:
    """`scatter` along `dim`: elementwise in the other dimensions."""
    given = operation.get("dim")
    dim = _number(0 if given is None else given) % max(1, len(operation.out))
    found = elementwise(facts, operation)
    if isinstance(found, Rows) and found.layout.dim == dim:
        return unproven(operation, "values of other examples, chosen by an index")
    return found


def diagonal(_: Facts, operation: Operation) -> State:
    """`diagonal` of two dimensions, which go to the end as one."""
    state, shape = operation.states[0], operation.shapes[0]
    if not isinstance(state, Rows) or shape is None:
        return state
    first, second = operation.get("dim1"), operation.get("dim2")
    dims = [_number(0 if first is None else first), _number(1 if second is None else second)]
    dims = [d % len(shape) for d in dims]
    if state.layout.dim in dims:
        return unproven(operation, "a diagonal over the examples of the batch")
    return Rows(state.layout.at(state.layout.dim - sum(d < state.layout.dim for d in dims)), state.factor)
