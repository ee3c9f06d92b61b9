# SPDX-License-Identifier: Apache-2.0
"""What a run of an estimator costs: the event of each charge, and of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from accountants import ADD_REMOVE, REPLACE, ZERO_OUT, Accountant, Composed, Event, Repeated, UnpricedEvent
from dpopt.budget import Budget, affordable
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.releases import mechanism_of
from dpopt.mechanisms import GaussianMechanism, Mechanism
from dpopt.sampling import Sampling

_MOST = 1 << 24


@dataclass(frozen=True, slots=True)
class Prices:
    """`at(n)` is the event of charge number n of a run; `constant` says that all are the same."""

    at: Callable[[int], Event]
    constant: bool

    def behind(self, charges: int) -> Prices:
        """Those of the charges that follow the first `charges`."""
        if self.constant or charges == 0:
            return self
        return Prices(lambda number: self.at(number + charges), constant=False)

    def whole(self, charges: int) -> Event:
        """The event of the first `charges` charges."""
        if self.constant:
            return Repeated(self.at(0), charges)
        counted = Counter(self.at(number) for number in range(charges))
        return Composed(tuple(Repeated(event, count) for event, count in counted.items()))

    def affordable(self, budget: Budget, rule: Accountant, spent: Event) -> int:
        """How many charges, from the first on, fit `budget` on top of `spent`, priced by `rule`."""
        if self.constant:
            return affordable(budget, self.at(0), rule, spent)

        def fits(charges: int) -> bool:
            whole = Composed((spent, self.whole(charges)))
            return charges == 0 or rule.curve(whole).epsilon(budget.delta) <= budget.epsilon

        high = 1
        while high < _MOST and fits(high):
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def prices(estimator: Estimator, sampling: Sampling, mechanism: Mechanism) -> Prices:
    """The prices of a run.

    Guarantees
    ----------
    Each charge is the event of the mechanism that releases that step, at its own noise
    (test_guarantee_each_step_is_charged_with_its_own_noise).
    """
    if estimator.factors is not None and sampling.steps_per_charge > 1:
        raise ValueError(
            "expected a sampler that draws each step anew where the noise varies from step to step; got "
            f"{type(sampling).__name__}, whose charges pay for a whole epoch; use Poisson sampling"
        )

    def at(charge: int) -> Event:
        return estimator.event(sampling, mechanism_of(estimator, mechanism, charge).event())

    if estimator.factors is not None:
        return Prices(at, constant=False)
    first = at(0)  # a value: what somebody changes in the mechanism later is then noticed
    return Prices(lambda charge: first, constant=True)


def require_priced(estimator: Estimator, relation: str) -> None:
    """Raise UnpricedEvent where neighbours differ by a record that is emptied, and an emptied one still speaks.

    The prices of `ZERO_OUT` take an emptied record for one that adds nothing. Around a centre it adds a clipped
    vector, which may be opposite to that of the full record, and a count has it on one of two sides.
    """
    if relation == ZERO_OUT and estimator.speaks_of_zero:
        raise UnpricedEvent(
            f"expected an estimator to which a record without a gradient adds nothing, under the relation {ZERO_OUT}; got "
            f"{estimator.setting['name']}, which counts or centres it; use {REPLACE}, or {ADD_REMOVE}"
        )


def priced(estimator: Estimator, sampling: Sampling, charges: int) -> Callable[[float], Event]:
    """A function from a noise multiplier to the event of a run of so many charges."""
    return lambda noise: prices(estimator, sampling, GaussianMechanism(noise)).whole(charges)
