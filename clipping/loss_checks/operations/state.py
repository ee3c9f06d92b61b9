# SPDX-License-Identifier: Apache-2.0
"""What is known of a tensor between the model's outputs and the loss: how it depends on the examples.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from clipping.loss_checks.operations.layout import Layout, Shape


class Factor(NamedTuple):
    """The number scale * B ** power, which multiplies what the examples give."""

    scale: float = 1.0
    power: int = 0

    def times(self, other: Factor) -> Factor:
        """The product."""
        return Factor(self.scale * other.scale, self.power + other.power)

    def over(self, other: Factor) -> Factor:
        """The quotient."""
        return Factor(self.scale / other.scale if other.scale else 0.0, self.power - other.power)

    def value(self, num_examples: int) -> float:
        """The number."""
        return self.scale * float(num_examples) ** self.power


ONE = Factor()


class Rows(NamedTuple):
    """Each part of the tensor, as `layout` says, depends on one example, times a common factor."""

    layout: Layout
    factor: Factor = ONE


class Alone(NamedTuple):
    """A sum of what some examples give, each by itself, by number: most often of one, in a loop over examples."""

    factors: Mapping[int, Factor]

    @property
    def single(self) -> bool:
        """Whether it depends on one example."""
        return len(self.factors) == 1


class Total(NamedTuple):
    """A sum of what all examples give, each by itself, times one of `factors` for each term of the loss.

    `elements` is how many were added up, where it is a plain sum of a tensor.
    """

    factors: tuple[Factor, ...]
    elements: int | None = None


class Unproven(NamedTuple):
    """Not known to keep the examples apart. `shown`: an operation was seen that brings them together."""

    reason: str
    shown: bool
    remedy: str = ""


State = Rows | Alone | Total | Unproven | None
"""None: no dependence on the examples was seen."""


@dataclass(slots=True)
class Facts:
    """What holds for one backward, and what has to hold in every other: the constants met on the way.

    `mean` says that the loss is said to be a mean. `tracing`: operations are followed as they run, so that saved
    numbers need no look. `constants` must be the same in every batch, and so must `tensors`, which are looked at later.
    `flags` must be false: what a device would have to be stopped for is asked at the end of the step. `read` are numbers
    that the loop read from the batch. `sized`: the loss was divided by the number of examples beside the mean. `unclear`: there is one example, and a number may be its own. `names` are
    the operations met. `again`: at these positions of the trail an attribute must have this value in every batch;
    with that, what was found holds for every equal trail, if it is `repeatable`.
    """

    mean: bool = True
    num_examples: int = 0
    tracing: bool = False
    constants: list[float] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    flags: list[Tensor] = field(default_factory=list)
    read: Container[float] = ()
    sized: bool = False
    unclear: bool = False
    names: set[str] = field(default_factory=set)
    position: int = 0
    again: list[tuple[int, str, float]] = field(default_factory=list)
    repeatable: bool = True

    def settled(self, factor: Factor) -> Factor:
        """ONE, after what is not linear: the factor becomes a constant inside each example's loss."""
        if factor is not ONE and factor != ONE:
            self.constants.append(factor.value(self.num_examples))
        return ONE


class Operation(NamedTuple):
    """One operation, forward: a node of the graph, or a call that was seen.

    `states` and `shapes` are those of its tensor inputs in order, None where nothing is known; `out` is the shape of
    output `which`; `get` gives an argument by its name in torch's schema, None where it is not there.
    """

    name: str
    states: tuple[State, ...]
    shapes: tuple[Shape | None, ...]
    out: Shape
    which: int
    get: Callable[[str], object]


Rule = Callable[[Facts, Operation], State]
"""How the output of an operation depends on the examples."""


def away(value: Tensor) -> bool:
    """Whether to read `value` would stop a device."""
    return value.device.type != "cpu"


SAVED = "_saved_"
"""What the names of arguments begin with, where nodes of a graph keep them."""


def attribute_of(name: str) -> str:
    """Under which name nodes keep argument `name` of their operation."""
    return SAVED + name


def unproven(operation: Operation, what: str, *, shown: bool = True, remedy: str = "") -> Unproven:
    """Name the operation."""
    return Unproven(f"{what} ({operation.name})", shown, remedy)


def ruled(rule: Rule, facts: Facts, operation: Operation) -> State:
    """What `rule` finds; arguments that it does not understand are not known to keep examples apart."""
    try:
        return rule(facts, operation)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError, ArithmeticError):
        return unproven(operation, "an operation with arguments that are not known", shown=False)
