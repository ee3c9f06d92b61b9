# SPDX-License-Identifier: Apache-2.0
"""A curve that keeps the events and computes nothing before it is asked: what PRV and PLD hand out."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from accountants.curve import Bound, check_count, check_delta, check_epsilon, spare
from accountants.events import Event
from accountants.methods.closed_forms import Leaves, added, multiplied
from accountants.relations import RELATIONS, priced


@dataclass(frozen=True, slots=True)
class Pricing:
    """How an accountant answers: a bound at a delta, and a delta at an epsilon, for merged leaves."""

    bound: Callable[[Leaves, float], Bound]
    delta: Callable[[Leaves, float], float]


@dataclass(frozen=True, slots=True)
class LazyCurve:
    """The composition of `leaves` (pair, count) under `relation`, priced by one accountant's `pricing`.

    `slip` is the delta that is lost besides (`accountants.relations`).

    Guarantees:
        - order of composition irrelevant: leaves are merged and kept in canonical order.
        - `bound(delta).method` says how a number was obtained.
    """

    leaves: Leaves
    pricing: Pricing
    relation: str
    slip: float

    @classmethod
    def of(cls, event: Event, pricing: Pricing, relation: str) -> "LazyCurve":
        """Price `event` under `relation`; raises `UnpricedEvent`, naming the leaf."""
        pairs, slip = priced(event, relation)
        return cls(pairs, pricing, relation, slip)

    def __add__(self, other: "LazyCurve", /) -> "LazyCurve":
        if not isinstance(other, LazyCurve):
            return NotImplemented
        if (other.pricing, other.relation) != (self.pricing, self.relation):
            raise ValueError(
                "curves must come from one accountant and relation to be added; got two; price the composed event with "
                "one of them"
            )
        leaves, slip = added(self.leaves, other.leaves), min(1.0, self.slip + other.slip)
        return LazyCurve(leaves, self.pricing, self.relation, slip)

    def __mul__(self, count: int, /) -> "LazyCurve":
        check_count(count)
        leaves, slip = multiplied(self.leaves, count), min(1.0, self.slip * count)
        return LazyCurve(leaves, self.pricing, self.relation, slip)

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon >= 0 proven at `delta`."""
        return self.bound(delta).epsilon

    def bound(self, delta: float) -> Bound:
        """Return `epsilon(delta)` with its method and assumptions."""
        check_delta(delta)
        left = spare(float(delta), self.slip)
        if left is None:
            return Bound(math.inf, delta, "slip", (RELATIONS[self.relation],))
        found = self.pricing.bound(self.leaves, left)
        return replace(found, delta=delta, assumptions=(RELATIONS[self.relation], *found.assumptions))

    def delta(self, epsilon: float) -> float:
        """Return the smallest delta proven at `epsilon`."""
        check_epsilon(epsilon)
        return min(1.0, self.slip + self.pricing.delta(self.leaves, float(epsilon)))
