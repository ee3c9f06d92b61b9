# SPDX-License-Identifier: Apache-2.0
"""What a run of an estimator costs: the event of each charge, and of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from accountants import ADD_REMOVE, REPLACE, ZERO_OUT, Accountant, Composed, Event, Repeated, UnpricedEvent
from accountants.calibrate import num_charges
from dpopt.budget.budget import Budget, affordable
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.step_mechanism import mechanism_of
from dpopt.mechanisms import GaussianMechanism, Mechanism
from dpopt.sampling.sampler import Sampling


@dataclass(frozen=True, slots=True)
class Prices:
    """`at(n)` is the event of charge number n of a run; `constant` says that all are the same."""

    at: Callable[[int], Event]
    constant: bool
    _first: list[Event] = field(default_factory=list, repr=False, compare=False)

    def behind(self, charges: int) -> Prices:
        """Those of the charges that follow the first `charges`."""
        if self.constant or charges == 0:
            return self
        return Prices(lambda number: self.at(number + charges), constant=False)

    def whole(self, charges: int) -> Event:
        """The event of the first `charges` charges."""
        if self.constant:
            return Repeated(self.at(0), charges)
        self._first.extend(self.at(number) for number in range(len(self._first), charges))
        counted = Counter(self._first[:charges])
        return Composed(tuple(Repeated(event, count) for event, count in counted.items()))

    def affordable(self, budget: Budget, rule: Accountant, spent: Event) -> int:
        """How many charges, from the first on, fit `budget` on top of `spent`, priced by `rule`."""
        if self.constant:
            return affordable(budget, self.at(0), rule, spent)
        return num_charges(
            self.whole,
            epsilon=budget.epsilon,
            delta=budget.delta,
            accountant=rule.name,
            relation=rule.relation,
            spent=spent,
        )


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

    known: dict[float, Event] = {}  # values: what somebody changes in the mechanism later is then noticed

    def at(charge: int) -> Event:
        factor = 1.0 if estimator.factors is None else estimator.factors(charge)
        if factor not in known:
            known[factor] = estimator.event(sampling, mechanism_of(estimator, mechanism, charge).event())
        return known[factor]

    if estimator.factors is not None:
        return Prices(at, constant=False)
    first = at(0)
    return Prices(lambda charge: first, constant=True)


class Priced(NamedTuple):
    """Prices, and the parts of the run that they are of; `fixed` says that none of these can change within.

    `every` is what each charge costs, None: not all of them cost the same, or not for good.
    """

    parts: tuple[Estimator, Sampling, Mechanism]
    prices: Prices
    fixed: bool
    every: Event | None

    @staticmethod
    def of(estimator: Estimator, sampling: Sampling, mechanism: Mechanism) -> Priced:
        """The prices of a run of these parts."""
        parts = (estimator, sampling, mechanism)
        kinds = [getattr(type(part), "__dataclass_params__", None) for part in parts]
        fixed, known = all(kind is not None and kind.frozen for kind in kinds), prices(*parts)
        return Priced(parts, known, fixed, known.at(0) if fixed and known.constant else None)


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
