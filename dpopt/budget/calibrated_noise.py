# SPDX-License-Identifier: Apache-2.0
"""The noise of a run within a budget: the least that keeps everything on the ledger to it, or that of its last run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from accountants import (
    ADD_REMOVE,
    Accountant,
    Composed,
    Event,
    Gaussian,
    Repeated,
    charged,
    from_dict,
    leaves,
    read,
)
from accountants.calibrate import noise_multiplier as calibrate
from dpopt.budget.budget import Budget, noise_within, require_needed, require_small_delta, tightened
from dpopt.budget.ledger_files import SharedLedger
from dpopt.budget.prices import priced
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.plain import Plain
from dpopt.sampling.poisson import PoissonSampling
from dpopt.sampling.registry import charges, touched
from dpopt.sampling.sampler import Sampling


@dataclass(frozen=True, slots=True)
class Standing:
    """What a ledger holds before a run: everything charged, and the event that its last run declared."""

    spent: Composed = field(default_factory=lambda: Composed(()))
    declared: Event | None = None

    @classmethod
    def of(cls, ledger: SharedLedger) -> Standing:
        """Of an open ledger, or of the file, or of none."""
        if ledger.held is not None:
            return cls(ledger.held.events(), _declared(ledger.held.attempts))
        if ledger.path is None or not ledger.path.exists():
            return cls()
        records = read(ledger.path).records
        configs = [record.payload.get("config") for record in records if record.kind == "attempt"]
        return cls(charged(records), _declared([c for c in configs if isinstance(c, Mapping)]))


def least_noise(
    budget: Budget,
    *,
    estimator: Estimator,
    sampling: Sampling,
    steps: int,
    num_records: int,
    rule: Accountant,
    standing: Standing,
    on_top: bool,
    tolerance: float | None,
) -> float:
    """The noise multiplier for `steps` steps within `budget`, which is for everything on the ledger.

    A run that continues a ledger keeps the noise of the last one where that fits: the configuration stays. Else the
    noise is that of a run of its own, and the budget ends it when it is used up; with `on_top`, that which leaves room
    for all `steps` on top of what was spent.

    Raises:
        ValueError: the delta is too large, no noise is needed, or none is enough.
        BudgetExhausted: no noise is enough, on top of what was spent.
    """
    require_small_delta(budget, num_records)
    require_needed(budget, touched(sampling, steps))
    price = priced(estimator, sampling, charges(sampling, steps))
    again = _again(budget, price, rule, standing)
    if again is not None:
        return again
    spent = standing.spent if on_top and standing.spent.events else None
    plain = isinstance(estimator, Plain) and rule.relation == ADD_REMOVE
    if spent is None and plain and isinstance(sampling, PoissonSampling):
        found = calibrate(
            epsilon=budget.epsilon, delta=budget.delta, sampling_rate=sampling.sampling_rate, steps=steps,
            accountant=rule.name,
        )  # fmt: skip
    else:
        found = noise_within(budget, rule, price, spent)
    if tolerance is None:
        return found
    before = () if spent is None else (spent,)
    return tightened(
        lambda noise: rule.curve(Composed((*before, price(noise)))).epsilon(budget.delta),
        found,
        budget.epsilon,
        tolerance,
    )


def _again(
    budget: Budget, price: Callable[[float], Event], rule: Accountant, standing: Standing
) -> float | None:
    """The noise multiplier that the last run declared, where it was this run's mechanism and as many steps still fit."""
    noise = None if standing.declared is None else _noise_of(standing.declared)
    if not noise or not standing.spent.events:
        return None
    whole = price(noise)
    step = whole.event if isinstance(whole, Repeated) else None
    if step != standing.declared:
        return None
    fits = rule.curve(Composed((standing.spent, whole))).epsilon(budget.delta) <= budget.epsilon
    return noise if fits else None


def _noise_of(event: Event) -> float | None:
    found = leaves(event)
    inner = getattr(found[0][0], "event", found[0][0]) if len(found) == 1 else None
    return inner.noise_multiplier if isinstance(inner, Gaussian) else None


def _declared(configs: Sequence[Mapping[str, object]]) -> Event | None:
    events = [event for config in configs if isinstance(event := config.get("event"), Mapping)]
    return from_dict(events[-1]) if events else None


def whole_steps(epochs: float, batches: int) -> int:
    """The steps of `epochs` epochs of so many batches."""
    return max(1, math.ceil(epochs * batches - 1e-9))
