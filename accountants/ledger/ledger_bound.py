# SPDX-License-Identifier: Apache-2.0
"""What everything on a ledger is worth, under the relation and the filter that the ledger itself states."""

import math
from typing import Protocol

from accountants.best import AdaptiveSchedule, best
from accountants.curve import Accountant, Bound, check_delta
from accountants.events import Composed
from accountants.filter_rule import ADAPTIVE_SCHEDULE, Rule
from accountants.relations import RELATIONS


class Charges(Protocol):
    """A ledger, open (`Ledger`) or as read (`History`)."""

    @property
    def relation(self) -> str:
        """Which datasets are neighbours."""
        ...

    @property
    def rule(self) -> Rule | None:
        """The rule of the filter that governs it."""
        ...

    def events(self) -> Composed:
        """Everything charged."""
        ...


def known_relation(ledger: Charges) -> str:
    """Return the relation of a ledger, one of `relations.RELATIONS`.

    Raises:
        ValueError: it is none of them.
    """
    if ledger.relation not in RELATIONS:
        raise ValueError(
            f"the relation of the ledger must be one of {', '.join(RELATIONS)} to be priced; got {ledger.relation!r}; "
            "price its export by hand (dpopt ledger export)"
        )
    return ledger.relation


def ledger_bound(ledger: Charges, delta: float, *, accountant: Accountant | None = None) -> Bound:
    """Bound the epsilon of everything on a ledger at `delta`, under its own relation.

    Where a filter governs it, that is the filter's guarantee: what was charged may have been chosen from earlier outputs,
    and then no accountant's price of it is a bound.

    Args:
        ledger: an open `Ledger`, or what `read` returned.
        delta: the delta of the guarantee.
        accountant: what prices a schedule that was fixed in advance; None: the tightest.

    Raises:
        AdaptiveSchedule: an accountant is given, and a filter governs the ledger.
        UnpricedEvent: nothing is proven for a charge under the relation of the ledger, or the accountant is of another.

    Guarantees
    ----------
    Never below the truth under the relation of the header, for a schedule fixed in advance or one that a filter has
    governed from the first charge (test_guarantee_a_ledger_is_priced_under_its_own_relation,
    test_guarantee_a_governed_ledger_is_worth_its_filter).
    """
    check_delta(delta)
    known_relation(ledger)
    rule, events = ledger.rule, ledger.events()
    if rule is None:
        return best(events, delta) if accountant is None else accountant.curve(events).bound(delta)
    if accountant is not None:
        raise AdaptiveSchedule(
            f"a ledger must be priced by the filter that governs it, epsilon {rule.epsilon:g} at delta {rule.delta:g}; got "
            f"the accountant {accountant.name!r}, which is for schedules fixed before the data are seen; leave it out"
        )
    if rule.kept(events):
        return rule.bound(delta)
    overrun = "the charges exceed what the filter of the ledger allows, so that it guarantees nothing"
    return Bound(math.inf, delta, "filter overrun", (RELATIONS[rule.relation], ADAPTIVE_SCHEDULE, overrun))
