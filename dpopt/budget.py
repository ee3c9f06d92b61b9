# SPDX-License-Identifier: Apache-2.0
"""A budget, and how many charges fit it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from accountants import Accountant, BudgetExhausted, Event
from accountants.calibrate import num_steps


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may be spent: (epsilon, delta) for everything on one ledger, under the ledger's relation."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and not math.isnan(self.epsilon)):
            raise ValueError(f"expected epsilon > 0; got {self.epsilon}; usual budgets lie between 0.5 and 8")
        if not 0 < self.delta < 1:
            raise ValueError(
                f"expected 0 < delta < 1; got {self.delta}; choose it well below 1 / number of records"
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
