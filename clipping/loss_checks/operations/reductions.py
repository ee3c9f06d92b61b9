# SPDX-License-Identifier: Apache-2.0
"""Rules of sums, means and everything else that reduces or normalises a dimension.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from clipping.loss_checks.operations.arithmetic import scaled
from clipping.loss_checks.operations.layout import Layout, Shape, reduced
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


def dims_of(value: object, num_dims: int) -> tuple[int, ...]:
    """Dimensions counted from the front; none or an empty list stand for all."""
    if value is None or (isinstance(value, Sequence) and not value):
        return tuple(range(num_dims))
    dims = tuple(value) if isinstance(value, Sequence) else (value,)
    return tuple(sorted(int(d) % max(1, num_dims) for d in dims))  # pyright: ignore[reportArgumentType]


def summed(facts: Facts, operation: Operation) -> State:
    """A sum."""
    return _linear(facts, operation, mean=False)


def averaged(facts: Facts, operation: Operation) -> State:
    """A mean over elements."""
    return _linear(facts, operation, mean=True)


def _linear(facts: Facts, operation: Operation, *, mean: bool) -> State:
    state, shape = operation.states[0], operation.shapes[0]
    if shape is None or not isinstance(state, Rows | Total | Alone):
        return state
    dims = dims_of(operation.get("dim"), len(shape))
    size = prod(shape[d] for d in dims) if shape else 1
    if isinstance(state, Rows):
        if state.layout.dim not in dims:
            kept = Rows(reduced(state.layout, dims, bool(operation.get("keepdim"))), state.factor)
            return scaled(kept, Factor(1 / size)) if mean else kept
        return total(facts, state.factor, size, mean=mean)
    if isinstance(state, Alone):  # an example's own number of elements is its own, that of several is not
        return scaled(state, Factor(1 / size)) if mean and not state.single else state
    return scaled(state, Factor(1 / size)) if mean else Total(state.factors)


def total(facts: Facts, factor: Factor, size: int, *, mean: bool) -> Total:
    """The sum of `size` elements of all examples, or its mean."""
    if mean:
        return Total((factor.times(Factor(facts.num_examples / size, -1)),))
    return Total((factor,), size)


def within(facts: Facts, operation: Operation) -> State:
    """Any other reduction or normalisation over `dim`, which must not be that of the examples."""
    state, shape = operation.states[0], operation.shapes[0]
    if shape is None or state is None or isinstance(state, Unproven):
        return state
    if isinstance(state, Alone) and state.single:
        facts.settled(next(iter(state.factors.values())))
        return Alone(dict.fromkeys(state.factors, Factor()))
    if not isinstance(state, Rows):
        return unproven(operation, "a function of a sum over the examples of the batch")
    dims = dims_of(operation.get("dim"), len(shape))
    if state.layout.dim in dims:
        return unproven(operation, "an operation over the examples of the batch, neither a sum nor a mean")
    facts.settled(state.factor)
    return Rows(_kept(state.layout, dims, shape, operation.out))


def of_matrices(facts: Facts, operation: Operation) -> State:
    """An operation on matrices in the last two dimensions, the same on each."""
    found: Layout | None = None
    for state, shape in zip(operation.states, operation.shapes, strict=True):
        if state is None:
            continue
        if not isinstance(state, Rows):
            return (
                state
                if isinstance(state, Unproven)
                else unproven(operation, "a function of a sum over the examples")
            )
        if shape is None or state.layout.dim >= len(shape) - 2 or found not in (None, state.layout):
            return unproven(operation, "an operation on matrices that hold several examples")
        facts.settled(state.factor)
        found = state.layout
    return None if found is None else Rows(found)


def _kept(layout: Layout, dims: Sequence[int], before: Shape, after: Shape) -> Layout:
    return reduced(layout, dims, keepdim=len(before) == len(after))
