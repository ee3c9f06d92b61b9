# SPDX-License-Identifier: Apache-2.0
"""A curve that keeps the events and computes nothing before it is asked: what PRV and PLD hand out."""

from collections.abc import Callable
from dataclasses import dataclass

from accountants.closed import Leaves, added, multiplied
from accountants.curve import Bound, check_count, check_delta, check_epsilon


@dataclass(frozen=True, slots=True)
class Pricing:
    """How an accountant answers: a bound at a delta, and a delta at an epsilon, for merged leaves."""

    bound: Callable[[Leaves, float], Bound]
    delta: Callable[[Leaves, float], float]


@dataclass(frozen=True, slots=True)
class LazyCurve:
    """The composition of `leaves` (mechanism, count), priced by one accountant's `pricing`.

    Guarantees:
        - order of composition irrelevant: leaves are merged and kept in canonical order.
        - `bound(delta).method` says how a number was obtained.
    """

    leaves: Leaves
    pricing: Pricing

    def __add__(self, other: "LazyCurve", /) -> "LazyCurve":
        if other.pricing != self.pricing:
            raise ValueError(
                "curves must come from one accountant to be added; got two; price the composed event with one of them"
            )
        return LazyCurve(added(self.leaves, other.leaves), self.pricing)

    def __mul__(self, count: int, /) -> "LazyCurve":
        check_count(count)
        return LazyCurve(multiplied(self.leaves, count), self.pricing)

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon >= 0 proven at `delta`."""
        return self.bound(delta).epsilon

    def bound(self, delta: float) -> Bound:
        """Return `epsilon(delta)` with its method and assumptions."""
        check_delta(delta)
        return self.pricing.bound(self.leaves, float(delta))

    def delta(self, epsilon: float) -> float:
        """Return the smallest delta proven at `epsilon`."""
        check_epsilon(epsilon)
        return self.pricing.delta(self.leaves, float(epsilon))
