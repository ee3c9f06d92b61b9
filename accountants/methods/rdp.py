# SPDX-License-Identifier: Apache-2.0
"""Renyi differential privacy of the Poisson-subsampled Gaussian: cheap, additive, valid everywhere.

With s the noise multiplier, q the sampling rate and a the order, the Renyi divergence of one step is

    rho(a) = log A(a) / (a - 1),    A(a) = E_{z ~ N(0, s^2)} [(1 - q + q exp((2z - 1) / (2 s^2)))^a],

for adding and for removing a record alike (Mironov, Talwar, Zhang 2019, arXiv:1908.10530, theorems 4 and 5).
What is computed is A(a) - 1, an integral of a positive function, so that tiny divergences keep all their digits
(`accountants.dominating_pairs.renyi_moments`).

Zero-concentrated privacy needs no accountant of its own: rho-zCDP is the line rho(a) = rho a, the curve of a plain
Gaussian, read off here at all orders; and a Poisson-subsampled Gaussian is no better than its unsampled
Gaussian at large orders, so that the line forgets the sampling (Bun, Steinke 2016, arXiv:1605.02065).

Conversion to (epsilon, delta): Canonne, Kamath, Steinke 2020, arXiv:2004.00010, proposition 12 (also Asoodeh
et al. 2020, arXiv:2008.06529); and total variation <= sqrt(1 - exp(-rho)) (Bretagnolle, Huber 1979).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accountants.curve import (
    FIXED_SCHEDULE,
    Bound,
    check_count,
    check_delta,
    check_epsilon,
    rounded_up,
    spare,
)
from accountants.events import Event
from accountants.methods.renyi_divergences import ORDERS, renyi, total_divergences
from accountants.relations import ADD_REMOVE, RELATIONS, priced

__all__ = ["ORDERS", "RDP", "RenyiCurve", "renyi"]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class RenyiCurve:
    """Renyi divergences `values[i]` (nats) at the fixed orders `ORDERS[i]`; addition is composition.

    Guarantees:
        - never below the truth: each value bounds the divergence from above.
        - finer than the usual orders: epsilon is at most that of Opacus' or dp_accounting's RDP accountant.
    """

    values: Array
    relation: str = ADD_REMOVE
    slip: float = 0.0

    def __add__(self, other: "RenyiCurve", /) -> "RenyiCurve":
        if not isinstance(other, RenyiCurve):
            return NotImplemented
        if self.relation != other.relation:
            raise ValueError(
                f"curves must be of one relation to be added; got {self.relation} and {other.relation}; price both anew"
            )
        with np.errstate(over="ignore"):
            values = self.values + other.values
        return RenyiCurve(values, self.relation, min(1.0, self.slip + other.slip))

    def __mul__(self, count: int, /) -> "RenyiCurve":
        check_count(count)
        with np.errstate(over="ignore"):
            values = self.values * count if count else np.zeros_like(ORDERS)
        return RenyiCurve(values, self.relation, min(1.0, self.slip * count))

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon >= 0 proven at `delta`, minimised over the orders."""
        check_delta(delta)
        left = spare(delta, self.slip)
        if left is None:
            return math.inf
        delta = left
        if not self.values.any():
            return 0.0
        if delta == 0 or _total_variation(self.values) <= delta:
            return math.inf if delta == 0 else 0.0
        a = ORDERS
        return rounded_up(
            max(0.0, float(np.min(self.values + np.log1p(-1 / a) - np.log(a * delta) / (a - 1))))
        )

    def delta(self, epsilon: float) -> float:
        """Return the smallest delta proven at `epsilon`, minimised over the orders."""
        check_epsilon(epsilon)
        return min(1.0, self.slip + self._delta(epsilon))

    def _delta(self, epsilon: float) -> float:
        if not self.values.any():
            return 0.0
        if math.isinf(epsilon):
            return 0.0 if math.isfinite(float(self.values.min())) else 1.0
        a = ORDERS
        with np.errstate(over="ignore"):
            logs = (a - 1) * (self.values - epsilon + np.log1p(-1 / a)) - np.log(a)
        # exp() multiplies the absolute rounding error of its argument
        slack = 1e-12 * (1 + abs(float(np.min(logs))))
        converted = math.exp(min(0.0, float(np.min(logs)) + slack))
        return min(1.0, converted, _total_variation(self.values))

    def bound(self, delta: float) -> Bound:
        """Return `epsilon(delta)` with its method and assumptions."""
        return Bound(self.epsilon(delta), delta, "rdp", (RELATIONS[self.relation], FIXED_SCHEDULE))


@dataclass(frozen=True, slots=True)
class RDP:
    """The Renyi accountant: milliseconds for any schedule, 5 to 20 % above the truth as a rule."""

    name: str = "rdp"
    adaptive: bool = True
    relation: str = ADD_REMOVE

    def curve(self, event: Event) -> RenyiCurve:
        """Price `event`; raises `UnpricedEvent`, naming the leaf."""
        pairs, slip = priced(event, self.relation)
        return RenyiCurve(total_divergences(pairs), self.relation, slip)


def _total_variation(values: Array) -> float:
    return rounded_up(math.sqrt(-math.expm1(-float(values.min()))))
