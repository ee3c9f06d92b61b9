# SPDX-License-Identifier: Apache-2.0
"""What a release costs: privacy curves, and the accountants that make them from events.

The law of this folder: **every number that leaves a curve is an upper bound**, rounded up, and can say by
which method and under which assumptions it was obtained (`Bound`).
"""

import math
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from accountants.events import Event

ADD_OR_REMOVE = "neighbours differ by adding or removing one record"
FIXED_SCHEDULE = "noise multipliers, sampling rates and counts were fixed before the data were seen"


@dataclass(frozen=True, slots=True)
class Bound:
    """A proven pair (epsilon, delta), the method that proved it, and the assumptions it stands on."""

    epsilon: float
    delta: float
    method: str
    assumptions: tuple[str, ...]


@runtime_checkable
class Curve(Protocol):
    """The set of (epsilon, delta) pairs known to hold for a release; closed under composition.

    Guarantees:
        - `epsilon` and `delta` never lie below the true value.
        - `a + b` bounds the two releases together, `a * n` bounds n runs of a.
    """

    def __add__(self, other: Self, /) -> Self: ...

    def __mul__(self, count: int, /) -> Self: ...

    def epsilon(self, delta: float) -> float:
        """Return the smallest proven epsilon >= 0 at this delta, in nats; `inf` when there is none."""
        ...

    def delta(self, epsilon: float) -> float:
        """Return the smallest proven delta in [0, 1] at this epsilon."""
        ...

    def bound(self, delta: float) -> Bound:
        """Return `epsilon(delta)` together with the method and the assumptions behind it."""
        ...


@runtime_checkable
class Accountant(Protocol):
    """The rule that turns an event into a curve.

    `adaptive` says whether its curves compose additively order by order, so that a filter which fixes one
    order in advance may let later noise multipliers and sampling rates depend on earlier outputs
    (Feldman, Zrnic 2021, arXiv:2008.11193). Where it is False the whole schedule must be fixed in advance.
    """

    @property
    def name(self) -> str:
        """The name under which the registry knows it."""
        ...

    @property
    def adaptive(self) -> bool:
        """Whether its curves may feed a filter over an adaptively chosen schedule."""
        ...

    @property
    def relation(self) -> str:
        """The relation between neighbours under which it prices, one of `relations.RELATIONS`."""
        ...

    def curve(self, event: Event) -> Curve:
        """Price `event`; raises `UnpricedEvent`, naming the leaf, where no price is known."""
        ...


def check_delta(delta: float) -> None:
    """Refuse a delta that is no probability below one."""
    if isinstance(delta, bool) or not (isinstance(delta, int | float) and 0 <= delta < 1):
        raise ValueError(f"delta must be a number in [0, 1); got {delta!r}; pass e.g. delta=1e-5")


def check_epsilon(epsilon: float) -> None:
    """Refuse an epsilon that is negative or not a number."""
    if isinstance(epsilon, bool) or not (isinstance(epsilon, int | float) and epsilon >= 0):
        raise ValueError(f"epsilon must be a number >= 0; got {epsilon!r}; pass e.g. epsilon=2.0")


def spare(delta: float, slip: float) -> float | None:
    """What is left of `delta` after `slip`, rounded down; None where nothing is."""
    if slip == 0:
        return delta
    left = (delta - slip) * (1 - 1e-12) - 1e-16 * slip
    return left if left > 0 else None


def check_count(count: int) -> None:
    """Refuse a number of compositions that is not an integer >= 0."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"count must be an integer >= 0; got {count!r}; pass the number of runs as an int")


def rounded_up(value: float) -> float:
    """`value` moved up past the rounding errors of a few dozen float64 operations (relative 1e-12)."""
    return value * (1 + 1e-12) if math.isfinite(value) and value > 0 else value
