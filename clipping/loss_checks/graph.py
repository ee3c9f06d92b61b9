# SPDX-License-Identifier: Apache-2.0
"""Goes up a trail from the outputs of the private model to the loss, and says how each tensor depends on the examples.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from clipping.loss_checks.operations.layout import Shape
from clipping.loss_checks.operations.state import (
    SAVED,
    Facts,
    Operation,
    Rows,
    State,
    Total,
    Unproven,
    ruled,
)
from clipping.loss_checks.trail import Inner, Kind, Node, Place, Trail

Lookup = Callable[[Tensor, int], State]
"""What was seen of how a constant tensor was made, for a batch of so many examples."""

_HALF, _WHOLE = 1 << 63, 1 << 64
_BESIDE = ("target", "weight", "mask", "condition", "pos_weight")
_OPERANDS = ("tensor1", "tensor2", "exponent", "end", "min", "max")
_UNKNOWN = Unproven("an output of the model without a dimension for the examples", shown=False)
_UNEQUAL = Unproven("outputs for different numbers of examples in one loss", shown=False)


def states(trail: Trail, facts: Facts, lookup: Lookup | None) -> list[list[State]]:
    """The state of each output of each node of `trail`."""
    found: list[list[State]] = []
    for position, (node, step) in enumerate(zip(trail.nodes, trail.steps, strict=True)):
        if isinstance(step, Inner):
            facts.position = position
            found.append(_evaluated(node, step, trail, found, facts, lookup))
        else:
            found.append(_outputs(step, facts))
    return found


def _outputs(places: tuple[Place, ...], facts: Facts) -> list[State]:
    found: list[State] = [_UNKNOWN] * (1 + max(place.number for place in places))
    for place in places:
        if place.layout is not None:
            known = facts.num_examples in (0, place.num_examples)
            facts.num_examples = facts.num_examples or place.num_examples
            found[place.number] = Rows(place.layout) if known else _UNEQUAL
    return found


def _evaluated(
    node: Node, step: Inner, trail: Trail, found: list[list[State]], facts: Facts, lookup: Lookup | None
) -> list[State]:
    inputs = [None if edge is None else found[edge[0]][edge[1]] for edge in step.edges]
    num_outputs = max(1, len(step.shapes))
    if all(state is None for state in inputs):
        return [None] * num_outputs
    kind = step.kind
    facts.names.add(kind.name)
    if kind.rule is None:
        why = next((state for state in inputs if isinstance(state, Unproven)), None)
        return [why or _unknown(kind)] * num_outputs
    sizes = [None if edge is None else _size(trail, edge) for edge in step.edges]
    if lookup is not None:
        why = _traced(node, inputs, sizes, lookup, facts.num_examples)
        if why is not None:
            return [why] * num_outputs

    def get(name: str) -> object:
        attribute = SAVED + name
        kind.asked[attribute] = None
        return _saved(node, attribute)

    operation = Operation(kind.name, tuple(inputs), tuple(sizes), (), 0, get)
    return [
        # What depends on the examples at its input does so at its output.
        ruled(kind.rule, facts, operation._replace(out=out, which=which)) or _unknown(kind)
        for which, out in enumerate(step.shapes)
    ]


def _saved(node: Node, attribute: str) -> object:
    """What the node saved as `attribute`; None where it did not."""
    value = getattr(node, attribute, None)
    if isinstance(value, int) and value >= _HALF:  # negative, as the graph shows it
        return value - _WHOLE
    if isinstance(value, tuple) and any(isinstance(x, int) and x >= _HALF for x in value):
        return tuple(x - _WHOLE if isinstance(x, int) and x >= _HALF else x for x in value)
    return value


def _unknown(kind: Kind) -> Unproven:
    return Unproven(f"an operation that is not known ({kind.name})", shown=False)


def _size(trail: Trail, edge: tuple[int, int]) -> Shape | None:
    step = trail.steps[edge[0]]
    if isinstance(step, Inner):
        return step.shapes[edge[1]]
    return next((place.shape for place in step if place.number == edge[1]), None)


def _traced(
    node: Node, inputs: list[State], sizes: list[Shape | None], lookup: Lookup, num_examples: int
) -> Unproven | None:
    """Add what was seen of the constants of a node to its inputs; one that mixes examples refuses the node."""
    operands = {"self": 0, "other": 1}
    for attribute in dir(node):
        name = attribute.removeprefix(SAVED)
        if name == attribute:
            continue
        value = getattr(node, attribute)
        for tensor in value if isinstance(value, tuple) else (value,):
            seen = lookup(tensor, num_examples) if isinstance(tensor, Tensor) else None
            place = operands.get(name, len(inputs))
            if seen is None or (isinstance(seen, Unproven) and not seen.shown):
                continue  # as little is known as of what Python made
            if place < len(inputs) and inputs[place] is None:
                inputs[place], sizes[place] = seen, tuple(tensor.shape)
            elif isinstance(seen, Unproven):
                return seen
            elif (name in _BESIDE and isinstance(seen, Rows | Total)) or (
                name in _OPERANDS and isinstance(seen, Total)
            ):
                inputs.append(seen)
                sizes.append(tuple(tensor.shape))
    return None
