# SPDX-License-Identifier: Apache-2.0
"""A budget, beside the refusal that guards it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from accountants import BudgetExhausted

__all__ = ["Budget", "BudgetExhausted"]


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may be spent: (epsilon, delta) for everything on one ledger, under add-or-remove-one."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (self.epsilon > 0 and not math.isnan(self.epsilon)):
            raise ValueError(f"expected epsilon > 0; got {self.epsilon}; usual budgets lie between 0.5 and 8")
        if not 0 < self.delta < 1:
            raise ValueError(
                f"expected 0 < delta < 1; got {self.delta}; choose it well below 1 / number of records"
            )
