# SPDX-License-Identifier: Apache-2.0
"""The tightest of the valid bounds, for parameters that were not chosen from outputs of the mechanism."""

from accountants.curve import Accountant, Bound, check_delta
from accountants.events import Event
from accountants.methods.hidden_feedback import FeedbackPricing
from accountants.methods.pld import PLD
from accountants.methods.prv import PRV
from accountants.methods.rdp import RDP
from accountants.nests import charged_under, leaves
from accountants.relations import ADD_REMOVE

SCHEDULES = ("fixed", "public", "dp_history")
"""Where noise multipliers, rates and counts come from: set beforehand; from public data; from private outputs."""

_FEW = 64  # the Renyi bound takes 10 ms per distinct mechanism


class AdaptiveSchedule(ValueError):
    """A bound for parameters fixed in advance was asked for parameters chosen from private outputs."""


def best(event: Event, delta: float, *, schedule: str = "fixed", relation: str | None = None) -> Bound:
    """Bound the epsilon of `event` at `delta` by the least of the bounds that hold; `Bound.method` says which.

    Args:
        event: everything that is released.
        delta: the delta of the guarantee.
        schedule: where the parameters in `event` come from, one of `SCHEDULES`. Steps not taken count too: when
            training may stop early, price the steps that were planned.
        relation: which datasets are neighbours, one of `relations.RELATIONS`; None: as the charges of a ledger say,
            else add-or-remove-one.

    Raises:
        AdaptiveSchedule: `schedule` is "dp_history"; only a `Filter` covers that.
        UnpricedEvent: no price is known under this relation; the message names the leaf.

    Guarantees:
        - never above "rdp" or "pld" alone, never below the truth.
    """
    if schedule not in SCHEDULES:
        raise ValueError(
            f"schedule must be one of {SCHEDULES}; got {schedule!r}; say where the parameters come from"
        )
    if schedule == "dp_history":
        raise AdaptiveSchedule(
            "parameters must be fixed before the data are seen; got a schedule chosen from private outputs, for "
            "which composing what happened is no bound (delta is exceeded 1.5 times); spend through a Filter"
        )
    check_delta(delta)
    relation = relation or next(iter(charged_under(event)), ADD_REMOVE)
    bounds = [_bound(PLD(relation=relation), event, delta)]
    if bounds[0].method == "rdp":
        bounds.append(_bound(PRV(relation=relation), event, delta))
    elif bounds[0].method == "pld" and len(leaves(event)) <= _FEW:
        bounds.append(_bound(RDP(relation=relation), event, delta))
    return min(bounds, key=lambda bound: bound.epsilon)


def _bound(rule: Accountant, event: Event, delta: float) -> Bound:
    return FeedbackPricing(rule).curve(event).bound(delta)
