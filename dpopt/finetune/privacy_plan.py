# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning run will claim, settled before it starts: the budget, the noise and the price of every step.

The law of this file: everything here is public, and is fixed before the first record is looked at, but for the
number of records, which counts as public.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from accountants import (
    ADD_REMOVE,
    Accountant,
    BudgetExhausted,
    Composed,
    Event,
    Repeated,
    accountant,
)
from accountants.calibrate import noise_multiplier as smallest_noise
from dpopt.audit.canaries.drawing import widened
from dpopt.budget.budget import Budget, noise_within, require_needed, require_small_delta
from dpopt.budget.prices import priced
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.plain import Plain
from dpopt.finetune.continued_ledger import spent_before
from dpopt.sampling.poisson import PoissonSampling
from dpopt.sampling.registry import charges, sized, touched
from dpopt.sampling.sampler import Sampling

DEFAULT_EPSILON = 8.0
_PRICED_POINTS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyPlan:
    """The private side of a run: what each step is, how many there are, and what all of them cost.

    `epsilon` bounds everything on the ledger once the run has ended; `budget` is the cap that the ledger is held
    to, None without one; `spent` is what the ledger held before.
    """

    num_records: int
    batch_size: int
    steps: int
    delta: float
    noise_multiplier: float
    accountant: str
    budget: float | None
    epsilon: float
    spent: Composed
    estimator: Estimator
    sampler: str = "poisson"
    relation: str = ADD_REMOVE
    num_canaries: int = 0

    @property
    def records_sampling(self) -> Sampling:
        """The sampler of the records, before canaries join them."""
        return sized(self.sampler, num_records=self.num_records, batch_size=self.batch_size)

    @property
    def sampling(self) -> Sampling:
        """The sampler of the run, which is priced."""
        return (
            widened(self.records_sampling, self.num_canaries) if self.num_canaries else self.records_sampling
        )

    @property
    def sampling_rate(self) -> float:
        """The probability with which a record takes part in a step, or the part of the records that a step takes."""
        return self.batch_size / self.num_records

    @property
    def num_spent(self) -> int:
        """How many charges the ledger held before."""
        return sum(event.count for event in self.spent.events if isinstance(event, Repeated))

    def prices(self) -> Callable[[int], float]:
        """A function from a number of steps to an upper bound on epsilon after them.

        It prices some of the numbers only, and answers with the next one priced: always from above.
        """

        @cache
        def price(steps: int) -> float:
            rule = accountant(self.accountant, self.relation)
            whole = priced(self.estimator, self.sampling, charges(self.sampling, steps))
            return _price(self.spent, rule, whole, self.noise_multiplier, steps)(self.delta)

        stride = max(1, math.ceil(self.steps / _PRICED_POINTS))
        return lambda step: price(min(self.steps, math.ceil(step / stride) * stride))


def default_delta(num_records: int) -> float:
    """The largest power of ten at most half of 1 / num_records."""
    return float(f"1e{math.floor(math.log10(1 / (2 * num_records)))}")


def plan_privacy(
    *,
    num_records: int,
    batch_size: int,
    steps: int,
    epsilon: float | None,
    delta: float | None,
    noise_multiplier: float | None,
    accountant_name: str,
    ledger: Path,
    estimator: Estimator,
    sampler: str = "poisson",
    relation: str = ADD_REMOVE,
    allow_large_delta: bool = False,
    num_canaries: int = 0,
) -> PrivacyPlan:
    """Settle the noise for a budget, or the price of a noise, on top of what `ledger` holds already.

    Without `noise_multiplier`, the smallest noise is taken that keeps the whole ledger within `epsilon`.

    Raises:
        ValueError: delta is above 1 / num_records without `allow_large_delta`, or covers all who are drawn.
        BudgetExhausted: no noise, or not the noise given, keeps the run within the budget.
    """
    delta = default_delta(num_records) if delta is None else delta
    require_small_delta(Budget(math.inf, delta, allow_large_delta), num_records)
    spent = spent_before(ledger, relation)
    sampling = sized(sampler, num_records=num_records, batch_size=batch_size)
    sampling = widened(sampling, num_canaries) if num_canaries else sampling
    rule = accountant(accountant_name, relation)
    budget = DEFAULT_EPSILON if epsilon is None and noise_multiplier is None else epsilon
    whole = priced(estimator, sampling, charges(sampling, steps))
    if noise_multiplier is None:
        assert budget is not None
        require_needed(Budget(budget, delta), touched(sampling, steps))
        noise_multiplier = _noise(spent, rule, sampling, estimator, steps, Budget(budget, delta), ledger)
        _refuse_drowned(noise_multiplier, batch_size, budget)
    found = _price(spent, rule, whole, noise_multiplier, steps)(delta)
    if budget is not None and found > budget:
        raise BudgetExhausted(
            f"expected {steps} steps at noise multiplier {noise_multiplier:g} to fit epsilon {budget:g} at delta "
            f"{delta:g}; got epsilon {found:.3g}; raise the noise or epsilon, take fewer steps or smaller batches, "
            "or leave --noise-multiplier out to have it computed (nothing was charged)"
        )
    return PrivacyPlan(
        num_records=num_records,
        batch_size=batch_size,
        steps=steps,
        delta=delta,
        noise_multiplier=noise_multiplier,
        accountant=accountant_name,
        budget=budget,
        epsilon=found,
        spent=spent,
        estimator=estimator,
        sampler=sampler,
        relation=relation,
        num_canaries=num_canaries,
    )


def _refuse_drowned(noise: float, batch_size: int, budget: float) -> None:
    # The sum of a batch has at most the norm batch size * clip norm, were all its gradients to agree.
    if noise > batch_size:
        raise BudgetExhausted(
            f"expected a budget that leaves a signal; got epsilon {budget:g}, whose noise is {noise:.3g} clip norms in "
            f"every coordinate, more than all {batch_size} records of a batch together; raise epsilon, take fewer "
            "steps, or find more records (nothing was charged)"
        )


def _price(
    spent: Composed, rule: Accountant, whole: Callable[[float], Event], noise: float, steps: int
) -> Callable[[float], float]:
    events = (*spent.events, whole(noise)) if steps else spent.events
    return rule.curve(Composed(events)).epsilon


def _noise(
    spent: Composed,
    rule: Accountant,
    sampling: Sampling,
    estimator: Estimator,
    steps: int,
    budget: Budget,
    ledger: Path,
) -> float:
    before = rule.curve(spent).epsilon(budget.delta)
    if spent.events and before >= budget.epsilon:
        raise BudgetExhausted(
            f"expected room within epsilon {budget.epsilon:g} at delta {budget.delta:g}; got {before:.3g} spent already "
            f"on the ledger {ledger}; raise --epsilon if the promise to the people in the data allows it (nothing was "
            "charged)"
        )
    plain = isinstance(estimator, Plain) and rule.relation == ADD_REMOVE
    if spent.events or not plain or not isinstance(sampling, PoissonSampling):
        return noise_within(budget, rule, priced(estimator, sampling, charges(sampling, steps)), spent)
    try:
        return smallest_noise(
            epsilon=budget.epsilon, delta=budget.delta, sampling_rate=sampling.sampling_rate, steps=steps,
            accountant=rule.name,
        )  # fmt: skip
    except ValueError as error:
        raise BudgetExhausted(f"{error} (nothing was charged)") from error
