# SPDX-License-Identifier: Apache-2.0
"""Zero-concentrated privacy: one number, rho, that adds up; for Gaussians on full batches or whole epochs.

A release is rho-zCDP if its Renyi divergence of every order a > 1 is at most rho a (Bun, Steinke 2016,
arXiv:1605.02065, definition 1.1); a Gaussian of noise multiplier s has rho = 1 / (2 s^2) (proposition 1.6), and
rho adds under adaptive composition (lemma 1.7). A sampled Gaussian is charged as the unsampled one: sampling
mixes pairs that each cost rho (quasi-convexity), and no rho sees more than that at large orders.

The line becomes (epsilon, delta) at the best order a, not only at a grid of them, by Canonne, Kamath, Steinke 2020,
arXiv:2004.00010, proposition 12; that is below rho + 2 sqrt(rho log(1/delta)).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from accountants.curve import (
    FIXED_SCHEDULE,
    Bound,
    check_count,
    check_delta,
    check_epsilon,
    rounded_up,
    spare,
)
from accountants.dominating_pairs.sampled_step import SHIFTED, Step
from accountants.events import Event, Gaussian, PoissonSampled
from accountants.relations import ADD_REMOVE, RELATIONS, Pair, priced


@dataclass(frozen=True, slots=True)
class ConcentratedCurve:
    """rho-zCDP under `relation`, and the delta `slip` that is lost besides.

    Guarantees
    ----------
    `epsilon` and `delta` are those of one order each, and every order gives a valid bound
    (test_guarantee_zcdp_is_never_below_the_gaussian).
    """

    rho: float
    relation: str = ADD_REMOVE
    slip: float = 0.0

    def __add__(self, other: "ConcentratedCurve", /) -> "ConcentratedCurve":
        if not isinstance(other, ConcentratedCurve):
            return NotImplemented
        if self.relation != other.relation:
            raise ValueError(
                f"curves must be of one relation to be added; got {self.relation} and {other.relation}; price both anew"
            )
        return ConcentratedCurve(self.rho + other.rho, self.relation, min(1.0, self.slip + other.slip))

    def __mul__(self, count: int, /) -> "ConcentratedCurve":
        check_count(count)
        rho = self.rho * count if count else 0.0
        return ConcentratedCurve(rho, self.relation, min(1.0, self.slip * count))

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon >= 0 proven at `delta`."""
        check_delta(delta)
        left = spare(delta, self.slip)
        if left is None:
            return math.inf
        if self.rho == 0:
            return 0.0
        if left == 0 or math.isinf(self.rho):
            return math.inf

        def at(x: float) -> float:  # x = log(a - 1)
            b = math.exp(x)
            return self.rho * (1 + b) + math.log(b / (1 + b)) - math.log((1 + b) * left) / b

        # rounding errors grow with the terms, log(1 / delta) / (a - 1) the largest
        return max(0.0, rounded_up(_least(at)) + 1e-13 * (1 + self.rho - math.log(left)))

    def delta(self, epsilon: float) -> float:
        """Return the smallest delta proven at `epsilon`."""
        check_epsilon(epsilon)
        return min(1.0, self.slip + self._delta(epsilon))

    def _delta(self, epsilon: float) -> float:
        if self.rho == 0:
            return 0.0
        if math.isinf(epsilon) or math.isinf(self.rho):
            return 1.0 if math.isinf(self.rho) else 0.0

        def log_delta(x: float) -> float:
            b = math.exp(x)
            return b * (self.rho * (1 + b) - epsilon + math.log(b / (1 + b))) - math.log1p(b)

        least = min(0.0, _least(log_delta))
        return min(1.0, math.exp(least + 1e-12 * (1 + abs(least))))

    def bound(self, delta: float) -> Bound:
        """Return `epsilon(delta)` with its method and assumptions."""
        return Bound(self.epsilon(delta), delta, "zcdp", (RELATIONS[self.relation], FIXED_SCHEDULE))


@dataclass(frozen=True, slots=True)
class ZCDP:
    """The accountant of one number: exact addition, within a few per cent of the truth for full batches."""

    name: str = "zcdp"
    adaptive: bool = True
    relation: str = ADD_REMOVE

    def curve(self, event: Event) -> ConcentratedCurve:
        """Price `event`; raises `UnpricedEvent`, naming the leaf."""
        pairs, slip = priced(event, self.relation)
        rho = math.fsum(count * _rho(pair) for pair, count in pairs)
        return ConcentratedCurve(rho * (1 + 1e-15), self.relation, slip)


def _rho(pair: Pair) -> float:
    match pair:
        case Gaussian(noise_multiplier=s) | PoissonSampled(event=Gaussian(noise_multiplier=s)):
            return 0.5 / s / s
        case Step(noise_multiplier=s, pair=kind, shift=shift) if kind == SHIFTED:  # at distance 1 + shift
            return (1 + shift) ** 2 / (2 * s) / s
        case Step(noise_multiplier=s):  # one record replaced: at distance 2
            return 2 / s / s
        case _:
            return math.inf


def _least(value: Callable[[float], float]) -> float:
    """Search the least value over x = log(a - 1) by golden sections; any x will do, a better one is tighter."""
    low, high, ratio = -30.0, 30.0, (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if value(left) <= value(right) else (left, high)
    return value((low + high) / 2)
