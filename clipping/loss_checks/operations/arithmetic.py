# SPDX-License-Identifier: Apache-2.0
"""Rules of elementwise operations: those that are linear carry factors on, the others stay inside an example.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from clipping.loss_checks.operations.layout import Layout
from clipping.loss_checks.operations.state import (
    ONE,
    Alone,
    Factor,
    Facts,
    Operation,
    Rows,
    State,
    Total,
    Unproven,
    attribute_of,
    away,
    unproven,
)

SMALL = 4096
"""Constant tensors up to so many elements are compared from batch to batch."""


def aligned(operation: Operation) -> Layout | int | Unproven | None:
    """Where the examples are in the output of an elementwise operation: a layout, or the one example, or nowhere."""
    found: Layout | int | None = None
    for state, shape in zip(operation.states, operation.shapes, strict=True):
        place: Layout | int
        if isinstance(state, Rows):
            place = state.layout
            if shape is not None and len(shape) != len(operation.out):
                place = place.at(place.dim + len(operation.out) - len(shape))
        elif isinstance(state, Alone) and state.single:
            place = next(iter(state.factors))
        elif state is None:
            continue
        elif isinstance(state, Unproven):
            return state
        else:
            return unproven(operation, "a function of a sum over the examples of the batch")
        if found is not None and found != place:
            return unproven(operation, "an operation that brings different examples together")
        found = place
    return found


def _placed(place: Layout | int | Unproven | None, factor: Factor) -> State:
    if isinstance(place, Layout):
        return Rows(place, factor)
    return Alone({place: factor}) if isinstance(place, int) else place


def _factor(state: State) -> Factor:
    if isinstance(state, Rows):
        return state.factor
    return next(iter(state.factors.values())) if isinstance(state, Alone) else ONE


def elementwise(facts: Facts, operation: Operation) -> State:
    """Any elementwise operation, linear or not."""
    place = aligned(operation)
    if place is not None and not isinstance(place, Unproven):
        for state in operation.states:
            facts.settled(_factor(state))
    return _placed(place, ONE)


def unchanged(_: Facts, operation: Operation) -> State:
    """A copy of the first input in the same shape."""
    return operation.states[0]


def replaced(facts: Facts, operation: Operation) -> State:
    """`copy_`: what was there is lost."""
    return elementwise(facts, operation._replace(states=operation.states[1:], shapes=operation.shapes[1:]))


def scaled(state: State, factor: Factor) -> State:
    """`state` times a number."""
    if isinstance(state, Rows):
        return Rows(state.layout, state.factor.times(factor))
    if isinstance(state, Alone):
        return Alone({example: known.times(factor) for example, known in state.factors.items()})
    if isinstance(state, Total):
        return Total(tuple(known.times(factor) for known in state.factors))
    return state


def negated(_: Facts, operation: Operation) -> State:
    """The negative."""
    return scaled(operation.states[0], Factor(-1.0))


def added(facts: Facts, operation: Operation) -> State:
    """A sum or a difference; the second input times `alpha`, negative for a difference."""
    first, second = operation.states[0], operation.states[1] if len(operation.states) > 1 else None
    alpha = operation.get("alpha")
    weight = float(alpha) if isinstance(alpha, int | float) else 1.0
    if operation.name == "rsub":
        first, second = second, first
    if operation.name in ("sub", "rsub"):
        weight = -weight
    return joined(facts, operation, first, scaled(second, Factor(weight)))


def joined(facts: Facts, operation: Operation, first: State, second: State) -> State:
    """The sum of two inputs of `operation`."""
    for state in (first, second):
        if isinstance(state, Unproven):
            return state
    if isinstance(first, Total) or isinstance(second, Total):
        return _sum_of_totals(facts, operation, first, second)
    if isinstance(first, Alone) and isinstance(second, Alone):
        return _united(facts, operation, first.factors, second.factors)
    if isinstance(first, Alone) and second is None:
        return first
    if isinstance(second, Alone) and first is None:
        return second
    place = aligned(operation)
    if not isinstance(place, Layout):
        return _placed(place, ONE)
    known = [state.factor for state in (first, second) if isinstance(state, Rows)]
    if len(known) == 2 and known[0] != known[1]:
        facts.constants.append(known[1].over(known[0]).value(facts.num_examples))
    return Rows(place, known[0])


def _sum_of_totals(facts: Facts, operation: Operation, first: State, second: State) -> State:
    if isinstance(first, Total) and isinstance(second, Total):
        return Total(first.factors + second.factors)
    other = second if isinstance(first, Total) else first
    if other is not None:
        return unproven(
            operation, "a mean or sum over the batch added to what each example gives", shown=facts.tracing,
            remedy="take the mean of each term before adding them",
        )  # fmt: skip
    if copied(operation):
        return copies(facts, operation)
    known = first if isinstance(first, Total) else second
    assert isinstance(known, Total)
    return Total(known.factors)


def _united(
    facts: Facts, operation: Operation, first: Mapping[int, Factor], second: Mapping[int, Factor]
) -> State:
    if prod(operation.out) != 1 and set(first) != set(second):
        return unproven(operation, "an operation that brings different examples together")
    factors = dict(first)
    for example, factor in second.items():
        known = factors.get(example)
        if known is not None and known != factor:
            facts.constants.append(factor.over(known).value(facts.num_examples))
        factors[example] = factor if known is None else known
    return complete(facts, factors)


def complete(facts: Facts, factors: Mapping[int, Factor]) -> State:
    """A sum of what single examples give: of the whole batch where all are there, with the same factor."""
    if len(factors) == facts.num_examples and len(set(factors.values())) == 1:
        return Total((next(iter(factors.values())),), len(factors))
    return Alone(factors)


def _is_plain(value: object) -> bool:
    """Whether it is a number of Python's, which reaches the graph as a tensor without dimensions."""
    if not isinstance(value, Tensor):
        return True
    return value.dim() == 0 and not away(value) and value.dtype in (torch.float64, torch.int64)


def number_of(facts: Facts, operation: Operation, name: str) -> float | None:
    """Argument `name` where it is a number, or a tensor of one element; None for anything else.

    One on a device stops it now, and is compared without a stop in later batches.
    """
    value = operation.get(name)
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        return None
    if away(value):
        facts.again.append((facts.position, attribute_of(name), value.item()))
    return float(value.item())


def multiplied(facts: Facts, operation: Operation) -> State:
    """A product."""
    left, right = operation.states[0], operation.states[1] if len(operation.states) > 1 else None
    for state in (left, right):
        if isinstance(state, Unproven):
            return state
    if left is None or right is None:
        state, name = (left, "other") if right is None else (right, "self")
        return None if state is None else _weighted(facts, operation, state, name, divide=False)
    place = aligned(operation)
    return _placed(place, _factor(left).times(_factor(right)))


def divided(facts: Facts, operation: Operation) -> State:
    """A quotient."""
    left, right = operation.states[0], operation.states[1] if len(operation.states) > 1 else None
    if isinstance(left, Total) and right is not None:
        return _by_count(facts, operation, left)
    for state in (left, right):
        if isinstance(state, Unproven):
            return state
    if right is None:
        return None if left is None else _weighted(facts, operation, left, "other", divide=True)
    return _placed(aligned(operation), _factor(left).over(_factor(right)))


def _by_count(facts: Facts, operation: Operation, total: Total) -> State:
    """A sum over a tensor that is made of the examples: a mean where it is the number of the summed elements."""
    value = None if facts.tracing else number_of(facts, operation, "other")
    if value is not None and value == total.elements:
        step = Factor(facts.num_examples / value, -1)
        return Total(tuple(factor.times(step) for factor in total.factors))
    return unproven(
        operation, "a division by a number made from the labels, masks or outputs of the whole batch"
    )


def _weighted(facts: Facts, operation: Operation, state: State, name: str, *, divide: bool) -> State:
    """`state` times the constant argument `name`, or over it."""
    if isinstance(state, Total) and copied(operation):
        return copies(facts, operation)
    if facts.tracing:
        return Total(state.factors) if isinstance(state, Total) else state
    if facts.num_examples == 1 and not _is_plain(operation.get(name)):
        facts.unclear = True  # a number for every example, or that of the one
        return state
    number = number_of(facts, operation, name)
    if number is None:
        _remember(facts, state, operation.get(name))
        return Total(state.factors) if isinstance(state, Total) else state
    if not number.is_integer() and number in facts.read:
        return unproven(operation, "a number that was read from the batch, as by .item()")
    return scaled(state, as_count(facts, state, 1 / number if divide and number else number))


def as_count(facts: Facts, state: State, number: float) -> Factor:
    """The factor `number`, read as a division by the number of examples where a mean still lacks one."""
    known = state.factors if isinstance(state, Total) else (_factor(state),)
    if facts.mean and number and all(factor.power == 0 for factor in known):
        times = 1 / (abs(number) * facts.num_examples)
        if times >= 0.999 and abs(times - round(times)) < 1e-5 * times:
            return Factor(number * facts.num_examples, -1)
    facts.sized = facts.sized or (facts.num_examples > 1 and abs(number) * facts.num_examples == 1)
    return Factor(number)


def copied(operation: Operation) -> bool:
    """Whether a sum over the examples is copied, by broadcasting, into more elements than it has."""
    sizes = (s for s, x in zip(operation.shapes, operation.states, strict=True) if isinstance(x, Total))
    return any(size is not None and prod(size) != prod(operation.out) for size in sizes)


def copies(facts: Facts, operation: Operation) -> Unproven:
    """What comes of that: each example may get a copy of what all give."""
    return unproven(operation, "copies of a sum over the examples", shown=facts.tracing)


def _remember(facts: Facts, state: State, value: object) -> None:
    """Weights of whole terms, as of a multi-task loss, must stay what they are."""
    if isinstance(state, Total) and isinstance(value, Tensor) and value.numel() <= SMALL:
        facts.tensors.append(value.detach())
        facts.repeatable = False
