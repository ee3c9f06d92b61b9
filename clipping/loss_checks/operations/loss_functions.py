# SPDX-License-Identifier: Apache-2.0
"""Rules of loss functions and layers of torch that are one operation.

Shapes: B examples.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from clipping.loss_checks.operations.arithmetic import elementwise
from clipping.loss_checks.operations.layout import Layout, Shape
from clipping.loss_checks.operations.reductions import total, within
from clipping.loss_checks.operations.state import (
    Alone,
    Factor,
    Facts,
    Operation,
    Rows,
    State,
    Unproven,
    attribute_of,
    unproven,
)

NONE, MEAN, SUM = 0, 1, 2

WEIGHTED = 'weigh the losses of reduction="none" and pass them to engine.backward(losses), which needs no mean of the weights'
IGNORED = (
    'average the losses of reduction="none" over each example\'s own positions (for language models '
    "dpopt.causal_lm_losses(logits, labels)) and pass them to engine.backward(losses)"
)


def reduced_elementwise(facts: Facts, operation: Operation) -> State:
    """Losses of each element, then `reduction`: weights change elements, never what a mean divides by."""
    found = elementwise(facts, operation._replace(out=_elements(operation)))
    return _reduced(facts, operation, found, prod(_elements(operation)))


def _elements(operation: Operation) -> Shape:
    if operation.get("reduction") in (None, NONE):
        return operation.out
    shapes = [shape for shape in operation.shapes if shape is not None]
    target = operation.get("target")
    if isinstance(target, Tensor):
        shapes.append(tuple(target.shape))
    return tuple(torch.broadcast_shapes(*shapes)) if shapes else operation.out


def _reduced(facts: Facts, operation: Operation, found: State, size: int) -> State:
    reduction = operation.get("reduction")
    if reduction in (None, NONE) or not isinstance(found, Rows | Alone):
        return found
    if isinstance(found, Alone):
        return found
    return total(facts, Factor(), size, mean=reduction == MEAN)


def row_losses(facts: Facts, operation: Operation) -> State:
    """Losses of rows (N, C), as margin losses over classes: a mean divides by their number."""
    state, shape = operation.states[0], operation.shapes[0]
    if not isinstance(state, Rows) or shape is None:
        return state
    if state.layout.dim != 0 or len(shape) != 2:
        return unproven(operation, "classes in the dimension of the examples", shown=False)
    facts.settled(state.factor)
    return _reduced(facts, operation, Rows(state.layout), shape[0])


def class_losses(facts: Facts, operation: Operation) -> State:
    """`nll_loss` and `nll_loss2d`: a mean divides by the sum of the weights of the targets that are not ignored."""
    state, shape = operation.states[0], operation.shapes[0]
    if not isinstance(state, Rows | Alone) or shape is None:
        return state if isinstance(state, Unproven | None) else unproven(operation, OF_SUM)
    for known in operation.states[1:]:
        if isinstance(known, Unproven):
            return known
        if known is not None and _place(known) != _place(state):
            return unproven(operation, "the labels of other examples than the outputs")
    if isinstance(state, Alone):
        return within(facts, operation)
    facts.settled(state.factor)
    if state.layout.dim != 0:
        return unproven(operation, "classes in the dimension of the examples")
    if operation.get("reduction") != MEAN:
        return _reduced(facts, operation, Rows(state.layout), prod(shape) // shape[1])
    return _class_mean(facts, operation, state.layout, prod(shape) // max(1, shape[1]))


def _place(state: State) -> object:
    return (
        state.layout if isinstance(state, Rows) else set(state.factors) if isinstance(state, Alone) else state
    )


def _class_mean(facts: Facts, operation: Operation, layout: Layout, size: int) -> State:
    if facts.tracing:
        return total(facts, Factor(), size, mean=True)
    if isinstance(operation.get("weight"), Tensor):
        return unproven(
            operation, "a mean that is divided by the class weights of the whole batch", remedy=WEIGHTED
        )
    target, ignore_index = operation.get("target"), operation.get("ignore_index")
    assert isinstance(target, Tensor) and isinstance(ignore_index, int)
    if size < _EXACT and _counted(operation.get("total_weight")) == size:
        facts.again.append((facts.position, attribute_of("total_weight"), float(size)))
        return total(facts, Factor(), size, mean=True)
    facts.repeatable = False
    counts = (target != ignore_index).reshape(layout.outer, facts.num_examples, -1).sum((0, 2))
    if bool((counts == counts[0]).all()) and int(counts[0]):
        return total(facts, Factor(), int(counts.sum()), mean=True)
    return unproven(operation, OF_COUNTED, remedy=IGNORED)


OF_SUM = "a function of a sum over the examples of the batch"
OF_COUNTED = "a mean that is divided by the number of the labels that are not ignored in the whole batch"
_EXACT = 1 << 24
"""Single precision counts so far."""


def _counted(total_weight: object) -> float | None:
    """How many labels were counted, where they have no weights."""
    return total_weight.item() if isinstance(total_weight, Tensor) else None


def connectionist(facts: Facts, operation: Operation) -> State:
    """`ctc_loss` of log probabilities (T, B, C): one loss for each example."""
    state = operation.states[0]
    if not isinstance(state, Rows):
        return state
    if state.layout != Layout(1):
        return unproven(operation, "examples elsewhere than in dimension 1", shown=False)
    facts.settled(state.factor)
    return Rows(Layout(0))


def layer(facts: Facts, operation: Operation) -> State:
    """A layer with the batch in dimension 0 of its input, and constants for weights."""
    if any(state is not None for state in operation.states[1:]):
        return unproven(operation, "a layer whose weights are made from the batch", shown=False)
    return batch_first(facts, operation)


def batch_first(facts: Facts, operation: Operation) -> State:
    """An operation with the batch in dimension 0 of all its inputs."""
    for state in operation.states:
        if isinstance(state, Unproven):
            return state
    rows = [state for state in operation.states if isinstance(state, Rows)]
    if not rows:
        return next((s for s in operation.states if s is not None), None)
    if any(state.layout != rows[0].layout or state.layout.dim != 0 for state in rows):
        return unproven(operation, "examples elsewhere than in dimension 0", shown=False)
    shape = operation.shapes[operation.states.index(rows[0])]
    if operation.get("training") is True or (shape is not None and shape[:1] != operation.out[:1]):
        return unproven(operation, "statistics of the whole batch")
    for state in rows:
        facts.settled(state.factor)
    return Rows(rows[0].layout)


def layer_normalised(facts: Facts, operation: Operation) -> State:
    """`native_layer_norm`, over the last dimensions."""
    state, shape = operation.states[0], operation.shapes[0]
    normalised = operation.get("normalized_shape")
    if not isinstance(state, Rows) or shape is None or not isinstance(normalised, list | tuple):
        return state
    if any(other is not None for other in operation.states[1:]):
        return unproven(operation, "a layer whose weights are made from the batch", shown=False)
    if state.layout.dim >= len(shape) - len(normalised):
        return unproven(operation, "an operation over the examples of the batch, neither a sum nor a mean")
    facts.settled(state.factor)
    return Rows(state.layout) if operation.which == 0 else None
