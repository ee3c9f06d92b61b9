# SPDX-License-Identifier: Apache-2.0
"""A budget, and how many charges fit it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from accountants import Accountant, BudgetExhausted, Event
from accountants.calibrate import LEAST_NOISE, least_noise, num_steps
from dpopt.public_numbers import check_real

_MOST_HALVINGS = 50


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may be spent: (epsilon, delta) for everything on one ledger, under the ledger's relation.

    A run refuses a delta above 1 / number of records, unless `allow_large_delta`: within such a delta, publishing
    one record as it is counts as private.
    """

    epsilon: float
    delta: float
    allow_large_delta: bool = False

    def __post_init__(self) -> None:
        check_real("epsilon", self.epsilon)
        check_real("delta", self.delta)
        if not (self.epsilon > 0 and not math.isnan(self.epsilon)):
            raise ValueError(f"expected epsilon > 0; got {self.epsilon}; usual budgets lie between 0.5 and 8")
        if not 0 < self.delta < 1:
            raise ValueError(
                f"expected 0 < delta < 1; got {self.delta}; choose it well below 1 / number of records"
            )


class Delta(Protocol):
    """What any budget says of its delta."""

    @property
    def delta(self) -> float:
        """The probability within which nothing is promised."""
        ...

    @property
    def allow_large_delta(self) -> bool:
        """Whether one above 1 / number of records is meant."""
        ...


def require_small_delta(budget: Delta, num_records: float) -> None:
    """Refuse a budget whose delta is above 1 / `num_records`, where it was not asked for by name.

    Raises:
        ValueError: it is, and `allow_large_delta` is not set.
    """
    if budget.delta * num_records > 1 + 1e-9 and not budget.allow_large_delta:
        raise ValueError(
            f"expected delta of at most 1 / number of records, {1 / num_records:.2g}; got {budget.delta:g}, which would "
            "call it private to publish one record out of all as it is; lower delta (a power of ten below is usual), or "
            "ask for it by name: allow_large_delta=True (on the command line, --allow-large-delta)"
        )


def require_needed(budget: Budget, touched: float) -> None:
    """Refuse a budget that a run meets without any noise, where it draws each record with probability `touched`.

    Raises:
        ValueError: epsilon is infinite, or delta covers all who are drawn: they would be published as they are.
    """
    if math.isinf(budget.epsilon):
        raise ValueError(
            "expected a finite epsilon; got inf, which needs no noise and protects nobody; for a run without privacy, "
            "to compare with, say noise_multiplier=0"
        )
    if touched <= budget.delta:
        raise ValueError(
            f"expected a delta below {touched:.3g}, the probability that the run draws a given record at all; got "
            f"{budget.delta:g}, within which all who are drawn could be published without noise; lower delta below 1 / "
            "number of records"
        )


def affordable(budget: Budget, event: Event, rule: Accountant, spent: Event) -> int:
    """How many charges of `event` fit the budget on top of `spent`, priced by `rule`."""
    return num_steps(
        event=event,
        epsilon=budget.epsilon,
        delta=budget.delta,
        accountant=rule.name,
        spent=rule.curve(spent),
        relation=rule.relation,
    )


def exhausted(budget: Budget, wanted: int, left: int, done: int, ledger: object) -> BudgetExhausted:
    """The refusal of `wanted` more steps where `left` fit, after `done` steps of the run."""
    return BudgetExhausted(
        f"expected {wanted} more step(s) to fit epsilon {budget.epsilon:g} at delta {budget.delta:g}; got room for "
        f"{left} after {done} step(s) of this run; raise the noise multiplier, lower the sampling rate, or stop here "
        f"(nothing was charged; ledger {ledger})"
    )


def tightened(price: Callable[[float], float], noise: float, epsilon: float, tolerance: float) -> float:
    """A noise multiplier of at most `noise`, with price(result) in [epsilon - tolerance, epsilon].

    Args:
        price: from a noise multiplier to an upper bound on epsilon, falling.
        noise: one whose price is at most `epsilon`.
        epsilon: the budget.
        tolerance: how much of it may be left, > 0.

    Raises:
        ValueError: `tolerance` is no number above 0.

    Guarantees
    ----------
    The result has been priced, and its price is within the budget (test_guarantee_the_least_noise_was_priced).
    """
    check_real("epsilon_tolerance", tolerance)
    if not tolerance > 0:
        raise ValueError(
            f"expected epsilon_tolerance > 0; got {tolerance}; 0.01 leaves at most that much of epsilon"
        )
    low, at_high = noise, price(noise)
    for _ in range(_MOST_HALVINGS):
        if epsilon - at_high <= tolerance:
            return noise
        low *= 0.99
        if price(low) > epsilon:
            break
        noise, at_high = low, price(low)
    for _ in range(_MOST_HALVINGS):
        if epsilon - at_high <= tolerance:
            break
        middle = math.sqrt(low * noise)
        found = price(middle)
        if found <= epsilon:
            noise, at_high = middle, found
        else:
            low = middle
    return noise


_MOST = 1e6


def noise_within(
    budget: Budget, rule: Accountant, priced: Callable[[float], Event], spent: Event | None = None
) -> float:
    """The least noise multiplier, to 0.2 %, that keeps a run on top of `spent` within the budget.

    `priced` maps a noise multiplier to the event of the whole run.

    Raises:
        BudgetExhausted: no noise up to a million clip norms does.
        ValueError: hardly any noise does, so that the budget protects nobody.
    """
    found = least_noise(
        priced,
        epsilon=budget.epsilon,
        delta=budget.delta,
        accountant=rule.name,
        relation=rule.relation,
        spent=spent,
    )
    if found is None or found > _MOST:
        raise BudgetExhausted(
            f"expected epsilon {budget.epsilon:g} at delta {budget.delta:g} to pay for the run with noise of at most "
            f"{_MOST:g} clip norms; got too little; raise epsilon or take fewer steps (nothing was charged)"
        )
    if found <= LEAST_NOISE:
        raise ValueError(
            f"expected a budget that asks for noise; got epsilon {budget.epsilon:g} at delta {budget.delta:g}, which the "
            "run meets with hardly any: at such a delta it may give records away; choose delta below 1 / number of "
            "records, or a smaller epsilon"
        )
    return found
