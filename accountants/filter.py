# SPDX-License-Identifier: Apache-2.0
"""A budget for noise multipliers, rates and counts that are chosen as training goes, from released outputs.

A filter is asked *before* each release and refuses the one that would not fit. What it guarantees is the
(epsilon, delta) it was made with, whatever the choices were; the epsilon "spent so far" is no guarantee (that
would be an odometer) and is not reported.

| made by | runs a step iff, this step included | why it holds |
|---|---|---|
| `Filter.at_order` | sum rho(a) <= B(a, delta), one a fixed in advance | Feldman, Zrnic 2021, arXiv:2008.11193, theorem 4.3 |
| `Filter.over_orders` | for some a of a finite set, sum rho(a) <= B(a, w_a delta), sum w_a <= 1 | below |
| `Filter.at_all_orders` | for all a of a set, sum rho(a) <= B(a, delta) | each order alone suffices |
| `Filter.of_gaussians` | sum 1 / noise_multiplier^2 <= mu^2; full batches, whole epochs | Smith, Thakurta 2022, arXiv:2210.17520 |

with rho the Renyi divergence of a step under the relation of the filter, B(a, d) = epsilon + (log d - log c)/(a - 1), c = (1 - 1/a)^(a-1) / a (the
conversion of Canonne, Kamath, Steinke 2020, arXiv:2004.00010, proposition 12).

Why several orders hold: give each transcript one order for which the rule held at its last step. With L the
loss of the transcript, (1 - exp(epsilon - L))_+ <= c exp((a-1)(L - epsilon)) for every a, and
exp((a-1)(L - sum rho(a))) is a supermartingale of mean <= 1; so the transcripts of order a add w_a delta at most.

Why any relation will do: nothing here asks what makes D and D' neighbours. The supermartingale is that of one pair
(D, D') in one direction, and needs D_a(step on D || step on D') <= rho(a) given the outputs so far. Each mechanism has a pair
that dominates it under the relation (`accountants.relations`), and x^a is a mixture of (x - u)_+ with weights
a (a-1) u^(a-2) >= 0 and of linear terms, so that the moment of order a of the likelihood ratio grows with the curve: that of the
dominating pair is above it. A record replaced costs the divergence of its own pair, for a full batch a
Gaussian of 2 / noise_multiplier in place of 1. A step that a Gaussian pair dominates is a post-processing of that pair
(Blackwell 1953, as in section 2 of Dong, Roth, Su 2022, arXiv:1905.02383), so the Gaussian rule takes the noise that the
relation leaves.

At another delta the same charges prove another epsilon: with all sums within B(a), delta(e) is at most
sum over a of c exp((a-1) (B(a) - e)), the least term alone where every order must hold.

What does *not* hold: stopping when the least epsilon over the orders, or the epsilon of "pld" or "prv" for what
happened, reaches the budget. Weights that add up to more than 1 are that rule and are refused: with orders 5 and
12, epsilon 3 and delta 1e-5 an adversary reaches delta 1.5e-5.

One filter is one budget. On a ledger, the rule is the ledger's: all filters made there are the same one, and direct
charges count in it and are held to it (`accountants.ledger.ledger`).
"""

from collections.abc import Iterable, Mapping
from typing import Self

import numpy as np

from accountants.curve import Accountant, Bound
from accountants.events import Event
from accountants.filter_rule import (
    ADAPTIVE_SCHEDULE,
    EVERY,
    ONE,
    SOME,
    BudgetExhausted,
    Rule,
    check_budget,
    gaussian_rule,
    renyi_divergences,
    renyi_limits,
    renyi_rule,
)
from accountants.ledger.ledger import Ledger
from accountants.ledger.ledger_bound import ledger_bound
from accountants.ledger.spending import Book, Memory
from accountants.methods.closed_forms import total_mu
from accountants.methods.rdp import ORDERS
from accountants.records import Scalar
from accountants.relations import ADD_REMOVE, check_relation, priced, require_charged_under

__all__ = ["ADAPTIVE_SCHEDULE", "BudgetExhausted", "Filter", "budget_filter", "choose_order"]


class Filter:
    """A budget (epsilon, delta) that later choices may not overrun. Make it before the first release.

    With a ledger, charges are durable before `spend` returns, earlier charges count, and the rule is declared
    in it: it governs the ledger for good. A resumed run with another rule, or a rule made after the first charge, is
    refused. `relation` says which datasets are neighbours: the ledger's own, or else add-or-remove-one.

    Guarantees:
        - the transcript of all accepted releases is (epsilon, delta) private under `relation`.
        - refused before the release: what raises `BudgetExhausted` was neither charged nor counted.
        - no charge is ever lost: a charge that failed to become durable is counted.
        - one at a time: of several threads, only as many are accepted as fit.
    """

    __slots__ = ("_book", "_ledger", "_rule", "delta", "epsilon")

    def __init__(self, rule: Rule, ledger: Ledger | None) -> None:
        self.epsilon, self.delta = rule.epsilon, rule.delta
        self._rule, self._ledger = rule, ledger
        self._book: Book = Memory(rule) if ledger is None else ledger
        if ledger is not None:
            ledger.govern(rule)

    @classmethod
    def at_order(
        cls,
        epsilon: float,
        delta: float,
        *,
        order: float,
        ledger: Ledger | None = None,
        relation: str | None = None,
    ) -> Self:
        """Fix one order; `choose_order` finds a good one. The cheapest rule when the plan is about kept."""
        return cls(renyi_rule(epsilon, delta, {order: 1.0}, ONE, _relation(ledger, relation)), ledger)

    @classmethod
    def over_orders(
        cls,
        epsilon: float,
        delta: float,
        *,
        weights: Mapping[float, float],
        ledger: Ledger | None = None,
        relation: str | None = None,
    ) -> Self:
        """Split delta over a few orders by `weights` (order: weight); any one of them may pay in the end."""
        return cls(renyi_rule(epsilon, delta, weights, SOME, _relation(ledger, relation)), ledger)

    @classmethod
    def at_all_orders(
        cls,
        epsilon: float,
        delta: float,
        *,
        orders: Iterable[float],
        ledger: Ledger | None = None,
        relation: str | None = None,
    ) -> Self:
        """Ask every order to hold: never better than the best of them alone."""
        weights = dict.fromkeys(orders, 1.0)
        return cls(renyi_rule(epsilon, delta, weights, EVERY, _relation(ledger, relation)), ledger)

    @classmethod
    def of_gaussians(
        cls, epsilon: float, delta: float, *, ledger: Ledger | None = None, relation: str | None = None
    ) -> Self:
        """Accept Gaussians on full batches or whole epochs only; nothing is lost against a schedule fixed before."""
        return cls(gaussian_rule(epsilon, delta, _relation(ledger, relation)), ledger)

    @classmethod
    def of_ledger(cls, ledger: Ledger) -> Self:
        """Go on with the filter that governs `ledger`.

        Raises:
            ValueError: none does.
        """
        if ledger.rule is None:
            raise ValueError(
                "the ledger must be governed by a filter; got one without; make it with budget_filter(..., ledger=) "
                "before the first charge"
            )
        return cls(ledger.rule, ledger)

    @property
    def relation(self) -> str:
        """Which datasets are neighbours, one of `relations.RELATIONS`."""
        return self._rule.relation

    def would_accept(self, event: Event) -> bool:
        """Tell whether `event` still fits. Free of charge: it looks at public numbers only."""
        require_charged_under(event, self.relation)
        return self._book.spending.has_room(event)

    def spend(self, event: Event, *, context: Mapping[str, Scalar] | None = None) -> None:
        """Charge `event`. Draw the noise only after this has returned.

        Args:
            event: what is about to be released.
            context: public numbers written beside the charge, e.g. {"step": 17}.

        Raises:
            BudgetExhausted: it does not fit; nothing was charged, release nothing.
            LedgerNotDurable: it could not be written; release nothing.
            UnpricedEvent: no price is known for it.
        """
        self._book.charge(event, context=context)

    def affords(self, event: Event) -> int:
        """Count how many charges of `event` still fit; 10^9 where that many do."""
        require_charged_under(event, self.relation)
        return self._book.spending.affords(event)

    def remaining(self) -> float:
        """Return the part of the budget that is left, in [0, 1], in the units of the rule. A public number."""
        return self._book.spending.left()

    def bound(self, delta: float | None = None) -> Bound:
        """Return what is guaranteed: the budget itself, however much of it was used; or what it proves at `delta`.

        Infinite where a ledger holds more than its filter allows, which no version of this library writes.
        """
        if self._ledger is None:
            return self._rule.bound(delta)
        return ledger_bound(self._ledger, self.delta if delta is None else delta)


def budget_filter(
    epsilon: float,
    delta: float,
    *,
    planned: Event,
    accountant: Accountant | None = None,
    ledger: Ledger | None = None,
    relation: str | None = None,
) -> Filter:
    """Make the filter that fits a plan: exact for full-batch Gaussians, else one Renyi order erring low.

    Args:
        epsilon: the budget.
        delta: the budget.
        planned: about what will be released; it chooses the rule, it binds nobody.
        accountant: the accountant that prices the run; refused unless it is fit for adaptive choices.
        ledger: where charges go.
        relation: which datasets are neighbours; None: as the ledger or else the accountant says, or add-or-remove-one.

    Raises:
        ValueError: the accountant needs a schedule fixed in advance ("pld", "prv"), or prices another relation.
    """
    if accountant is not None and not accountant.adaptive:
        raise ValueError(
            f"accountant must be adaptive to feed a filter; got {accountant.name!r}, whose bound for what happened "
            "is exceeded 1.5 times in delta when parameters follow outputs; pass 'rdp', or fix the schedule"
        )
    if accountant is not None and relation not in (None, accountant.relation):
        raise ValueError(
            f"relation must be that of the accountant, {accountant.relation!r}; got {relation!r}; pass one of them"
        )
    under = _relation(ledger, relation if accountant is None else accountant.relation)
    items, slip = priced(planned, under)
    if items and not slip and total_mu(items) is not None:
        return Filter.of_gaussians(epsilon, delta, ledger=ledger, relation=under)
    order = choose_order(planned, epsilon, delta, relation=under)
    return Filter.at_order(epsilon, delta, order=order, ledger=ledger, relation=under)


def choose_order(
    planned: Event, epsilon: float, delta: float, *, keep: float = 0.95, relation: str = ADD_REMOVE
) -> float:
    """Choose the lowest Renyi order that affords at least the part `keep` of what the best one does of `planned`.

    Too high an order is ruinous where the noise falls below the plan, too low an order is not. If the noise may
    fall far below it, plan with the least noise that will be used.

    Raises:
        ValueError: no order can afford anything at this budget.
    """
    epsilon, delta = check_budget(epsilon, delta)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a part in (0, 1]; got {keep!r}; leave it out")
    limits, cost = renyi_limits(ORDERS, epsilon, delta), renyi_divergences(planned, relation)
    if not (limits > 0).any():
        raise ValueError(
            f"epsilon must afford some order at delta={delta:g}; got {epsilon:g}; raise epsilon or delta"
        )
    affordable = np.maximum(limits, 0.0) / np.maximum(cost, 1e-300)
    good = (affordable >= keep * affordable.max()) & (limits > 0)
    return float(ORDERS[good].min())


def _relation(ledger: Ledger | None, relation: str | None) -> str:
    if relation is not None:
        check_relation(relation)
    if ledger is None:
        return relation or ADD_REMOVE
    if relation not in (None, ledger.relation):
        raise ValueError(
            f"relation must be that of the ledger, {ledger.relation!r}; got {relation!r}; leave it out"
        )
    return ledger.relation
