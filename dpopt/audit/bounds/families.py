# SPDX-License-Identifier: Apache-2.0
"""What an audit tests against: families of mechanisms, ordered by one number, how much they leak.

A mechanism with a stated (epsilon, delta) can be of many shapes. A few hundred records never see an event of
probability 1e-5, so a bound that allows every shape stays far below the epsilon of Gaussian noise; a bound that knows
the shape from the run's record says much more, and says so in its assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from scipy.special import ndtr, ndtri

from accountants import Composed, Curve, Event, Gaussian, PoissonSampled, Repeated, accountant

MOST = 1e4
"""The greatest strength looked at; for Gaussian noise, one ten-thousandth of the sensitivity."""


@dataclass(frozen=True, slots=True)
class Family:
    """Mechanisms of one shape, ordered by their strength >= 0; strength 0 leaks nothing but a delta.

    Args:
        name: a few words.
        assumption: what is assumed of the mechanism by testing against this family only, as a sentence.
        advantage: strength -> the total variation between the outputs with and without a record, rounded up.
        epsilon: (strength, delta) -> the epsilon of that mechanism at delta.
        power: (strength, false positive rate) -> the largest true positive rate of any test; None where it is not known.
    """

    name: str
    assumption: str
    advantage: Callable[[float], float]
    epsilon: Callable[[float, float], float]
    power: Callable[[float, float], float] | None


def _gaussian_power(mu: float, rate: float) -> float:
    return float(ndtr(ndtri(rate) + mu))


def _epsilon_of(event: Event, delta: float) -> float:
    return accountant("pld").curve(event).epsilon(delta)


def _gaussian(mu: float) -> Event:
    return Gaussian(1 / mu) if mu > 0 else Composed(())


GAUSSIAN = Family(
    name="one Gaussian release",
    assumption="the run leaks no more about a record, at any delta, than one Gaussian release of the same epsilon",
    advantage=lambda mu: math.erf(mu / math.sqrt(8)),
    epsilon=lambda mu, delta: _epsilon_of(_gaussian(mu), delta),
    power=_gaussian_power,
)
"""Gaussian differential privacy; the strength is mu = sensitivity / noise (Dong, Roth, Su 2022, arXiv:1905.02383)."""


def strength_of_epsilon(family: Family, epsilon: float, delta: float) -> float:
    """The strength at which the family has this epsilon at delta, to 1e-9 relative, from above."""
    low, high = 0.0, 1e-3
    while family.epsilon(high, delta) <= epsilon and high < MOST:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if family.epsilon(middle, delta) <= epsilon else (low, middle)
    return high


def gaussian_covers(curve: Curve, epsilon: float, delta: float, num_records: int) -> bool:
    """Whether a run leaks no more than the Gaussian release of (epsilon, delta), as far as so many records can tell.

    Args:
        curve: the price of the run; `epsilon` is not below its epsilon at `delta`.
        epsilon: of the claim.
        delta: of the claim.
        num_records: how many records look for it; at 33 losses up to the claim the run's delta may lie above
            the Gaussian's by a thousandth of 1 / num_records, which moves no probability of theirs by more than that.
    """
    if not (0 < epsilon < math.inf and delta > 0):
        return False
    release = accountant("pld").curve(_gaussian(strength_of_epsilon(GAUSSIAN, epsilon, delta)))
    losses = (epsilon * i / 32 for i in range(33))
    return all(curve.delta(loss) <= release.delta(loss) + 1e-3 / num_records for loss in losses)


@lru_cache(maxsize=64)  # equal families are one object
def any_mechanism(delta: float) -> Family:
    """Every mechanism that is (epsilon, delta)-differentially private at this one delta; the strength is epsilon."""

    def advantage(epsilon: float) -> float:
        return math.tanh(epsilon / 2) + 2 * delta / (1 + math.exp(min(epsilon, 700.0)))

    def power(epsilon: float, rate: float) -> float:
        high = math.exp(min(epsilon, 700.0))
        return max(0.0, min(1.0, high * rate + delta, 1 - (1 - delta - rate) / high))

    return Family(
        name="any mechanism",
        assumption="nothing about the shape of the mechanism",
        advantage=advantage,
        epsilon=lambda epsilon, at: epsilon if at >= delta else math.inf,
        power=power,
    )


@lru_cache(maxsize=64)
def poisson_steps(sampling_rate: float, num_steps: int) -> Family:
    """Gaussian steps on Poisson samples, with less noise than recorded; the strength is 1 / noise multiplier.

    Args:
        sampling_rate: the rate of the run's sampler.
        num_steps: how many steps it took.
    """

    def event(strength: float) -> Event:
        if strength == 0:
            return Composed(())
        return Repeated(PoissonSampled(sampling_rate, Gaussian(1 / strength)), num_steps)

    def advantage(strength: float) -> float:
        return accountant("pld").curve(event(strength)).delta(0.0)

    return Family(
        name="the recorded steps with less noise",
        assumption=f"the run was {num_steps} Gaussian steps on Poisson samples at rate {sampling_rate:g}, as recorded; only "
        "its noise is in doubt",
        advantage=advantage,
        epsilon=lambda strength, delta: _epsilon_of(event(strength), delta),
        power=None,
    )
