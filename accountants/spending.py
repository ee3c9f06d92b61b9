# SPDX-License-Identifier: Apache-2.0
"""What has been charged so far, and whether the rule of a filter has room for more: the memory of a ledger."""

import math
from collections import Counter

import numpy as np

from accountants.events import Composed, Event, Repeated, shown
from accountants.filter_rule import Array, BudgetExhausted, Rule

MANY = 10**9
"""What counts as no end of charges."""


class Spending:
    """Charges with their counts, and their total cost by the rule that governs them, if one does.

    It takes no lock: whoever owns it holds one from `require_room` to `add`.
    """

    __slots__ = ("_counts", "_priced", "_rule", "_totals")

    def __init__(self, rule: Rule | None = None) -> None:
        self._counts: Counter[Event] = Counter()
        self._rule: Rule | None = None
        self._priced: tuple[Event, Array] | None = None
        self.govern(rule)

    @property
    def rule(self) -> Rule | None:
        """What governs the charges."""
        return self._rule

    @property
    def known(self) -> tuple[Event, ...]:
        """The events charged, each once."""
        return (*self._counts,)

    @property
    def num_charges(self) -> int:
        """How many charges there were."""
        return self._counts.total()

    def govern(self, rule: Rule | None) -> None:
        """Let `rule` decide from now on, about what was charged before as well."""
        self._totals = np.zeros(1) if rule is None else rule.cost(self.events())
        self._rule, self._priced = rule, None

    def add(self, event: Event, count: int = 1) -> None:
        """Count `count` charges of `event`, whether there is room or not."""
        self._counts[event] += count
        if self._rule is not None:
            # Rounded up, so that charges far smaller than the total count as well.
            self._totals = np.nextafter(self._totals + count * self._cost(self._rule, event), math.inf)

    def events(self, relation: str | None = None) -> Composed:
        """Return everything charged as one event, equal charges merged, marked with `relation`."""
        counts = dict(self._counts)  # at once: another thread may be charging
        return Composed(tuple(Repeated(event, count) for event, count in counts.items()), relation)

    def has_room(self, event: Event) -> bool:
        """Tell whether `event` fits; always, where nothing governs."""
        return self._rule is None or self._rule.holds(self._totals + self._cost(self._rule, event))

    def require_room(self, event: Event) -> None:
        """Refuse an event that does not fit.

        Raises:
            BudgetExhausted: it does not fit.
            UnpricedEvent: the rule has no price for it.
        """
        rule = self._rule
        if rule is not None and not self.has_room(event):
            raise BudgetExhausted(
                f"the release must fit epsilon {rule.epsilon:g} at delta {rule.delta:g} ({rule.method}); got "
                f"{shown(event)} with {self.left():.3g} of the budget left; add noise, or stop here"
            )

    def affords(self, event: Event) -> int:
        """Count how many charges of `event` fit one after the other, at most `MANY`."""
        if self._rule is None:
            return MANY
        cost, low, high = self._cost(self._rule, event), 0, MANY
        while low < high:
            middle = (low + high + 1) // 2
            # Each charge is rounded up by itself.
            within = self._rule.holds(self._totals + middle * cost * (1 + 1e-9))
            low, high = (middle, high) if within else (low, middle - 1)
        return low

    def _cost(self, rule: Rule, event: Event) -> Array:
        # What is asked about is charged next. One assignment: threads may ask at the same time.
        priced = self._priced
        if priced is None or priced[0] is not event:
            self._priced = priced = (event, rule.cost(event))
        return priced[1]

    def left(self) -> float:
        """Return the part of the budget that is left, in [0, 1]; 1 where nothing governs."""
        return 1.0 if self._rule is None else self._rule.left(self._totals)
