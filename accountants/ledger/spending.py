# SPDX-License-Identifier: Apache-2.0
"""What has been charged so far, and whether the rule of a filter has room for more: the memory of a ledger."""

import math
import os
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from accountants.events import Composed, Event, Repeated
from accountants.filter_rule import Array, BudgetExhausted, Rule
from accountants.formats.event_json import require_small
from accountants.nests import shown
from accountants.records import Scalar
from accountants.relations import require_charged_under
from accountants.storage import LedgerLocked

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


class Book(Protocol):
    """What keeps charges for a filter: a ledger, or this process's memory."""

    @property
    def spending(self) -> Spending:
        """What was charged so far."""
        ...

    def charge(self, event: Event, *, context: Mapping[str, Scalar] | None = None) -> object:
        """Keep a charge, or raise `BudgetExhausted`."""
        ...


class Memory:
    """Charges that the process which made them keeps, under a lock; a fork has none of its own."""

    __slots__ = ("_mutex", "_pid", "spending")

    def __init__(self, rule: Rule) -> None:
        self.spending = Spending(rule)
        self._mutex, self._pid = threading.Lock(), os.getpid()

    def charge(self, event: Event, *, context: Mapping[str, Scalar] | None = None) -> None:
        """Count `event`, or raise `BudgetExhausted`; the context is not kept."""
        if self._pid != os.getpid():
            raise LedgerLocked(
                f"a filter must be spent by the process that made it, {self._pid}; got {os.getpid()}, whose copy would "
                "spend the budget again; spend in the parent"
            )
        rule = self.spending.rule
        assert rule is not None
        require_charged_under(event, rule.relation)
        require_small(event)
        with self._mutex:
            self.spending.require_room(event)
            self.spending.add(event)
