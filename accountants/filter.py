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
| `Filter.of_gaussians` | sum 1 / noise_multiplier^2 <= mu^2; full batches only | Smith, Thakurta 2022, arXiv:2210.17520 |

with rho the Renyi divergence of a step, B(a, d) = epsilon + (log d - log c)/(a - 1), c = (1 - 1/a)^(a-1) / a (the
conversion of Canonne, Kamath, Steinke 2020, arXiv:2004.00010, proposition 12).

Why several orders hold: give each transcript one order for which the rule held at its last step. With L the
loss of the transcript, (1 - exp(epsilon - L))_+ <= c exp((a-1)(L - epsilon)) for every a, and
exp((a-1)(L - sum rho(a))) is a supermartingale of mean <= 1; so the transcripts of order a add w_a delta at most.

What does *not* hold: stopping when the least epsilon over the orders, or the epsilon of "pld" or "prv" for what
happened, reaches the budget. Weights that add up to more than 1 are that rule and are refused: with orders 5 and
12, epsilon 3 and delta 1e-5 an adversary reaches delta 1.5e-5.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from accountants.closed import total_mu
from accountants.curve import ADD_OR_REMOVE, Accountant, Bound
from accountants.events import Event, Gaussian, UnpricedEvent
from accountants.gaussian import gaussian_delta
from accountants.ledger import Ledger
from accountants.rdp import ORDERS, RDP
from accountants.records import Scalar
from accountants.relations import ADD_REMOVE, priced

Array = NDArray[np.float64]

ADAPTIVE_SCHEDULE = (
    "each release may depend on the released outputs before it, and on nothing else that is private"
)

_ROUNDING = 1e-12  # relative; covers adding up a million charges


class BudgetExhausted(RuntimeError):
    """The next release would exceed the budget; it was neither charged nor made."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a charge costs at each order, the limits, and how many orders must hold; `config` names it all."""

    cost: Callable[[Event], Array]
    limits: Array
    every: bool
    config: dict[str, object]
    method: str

    def holds(self, totals: Array) -> bool:
        within = totals * (1 + _ROUNDING) <= self.limits
        return bool(within.all() if self.every else within.any())


class Filter:
    """A budget (epsilon, delta) that later choices may not overrun. Make it before the first release.

    With a ledger, charges are durable before `spend` returns, earlier charges count, and the rule is declared
    in it: a resumed run with another rule, or a rule made after the first charge, is refused.

    Guarantees:
        - the transcript of all accepted releases is (epsilon, delta) private, adding or removing one record.
        - refused before the release: what raises `BudgetExhausted` was neither charged nor counted.
        - no charge is ever lost: a charge that failed to become durable is counted.
    """

    __slots__ = ("_ledger", "_rule", "_totals", "delta", "epsilon")

    def __init__(self, epsilon: float, delta: float, rule: _Rule, ledger: Ledger | None) -> None:
        self.epsilon, self.delta = epsilon, delta
        self._rule, self._ledger = rule, ledger
        self._totals = np.zeros_like(rule.limits)
        if ledger is not None:
            _declare(ledger, {"epsilon": epsilon, "delta": delta, **rule.config})
            self._totals = self._totals + rule.cost(ledger.events())

    @classmethod
    def at_order(cls, epsilon: float, delta: float, *, order: float, ledger: Ledger | None = None) -> Self:
        """Fix one order; `choose_order` finds a good one. The cheapest rule when the plan is about kept."""
        return cls(epsilon, delta, _renyi_rule(epsilon, delta, {order: 1.0}, False, "one order"), ledger)

    @classmethod
    def over_orders(
        cls, epsilon: float, delta: float, *, weights: Mapping[float, float], ledger: Ledger | None = None
    ) -> Self:
        """Split delta over a few orders by `weights` (order: weight); any one of them may pay in the end."""
        if math.fsum(weights.values()) > 1 + 1e-12:
            raise ValueError(
                f"weights must add up to at most 1; got {math.fsum(weights.values()):g}: the least epsilon over "
                "several orders at full delta is no bound for adaptive choices; divide the weights by their sum"
            )
        return cls(epsilon, delta, _renyi_rule(epsilon, delta, weights, False, "some order"), ledger)

    @classmethod
    def at_all_orders(
        cls, epsilon: float, delta: float, *, orders: Iterable[float], ledger: Ledger | None = None
    ) -> Self:
        """Ask every order to hold: never better than the best of them alone."""
        rule = _renyi_rule(epsilon, delta, dict.fromkeys(orders, 1.0), True, "every order")
        return cls(epsilon, delta, rule, ledger)

    @classmethod
    def of_gaussians(cls, epsilon: float, delta: float, *, ledger: Ledger | None = None) -> Self:
        """Accept full-batch Gaussians only, and lose nothing against a schedule fixed in advance."""
        _check_budget(epsilon, delta)
        mu = _largest_mu(epsilon, delta)
        rule = _Rule(_squared_mu, np.array([mu * mu]), True, {"rule": "gaussian"}, "gaussian filter")
        return cls(epsilon, delta, rule, ledger)

    def would_accept(self, event: Event) -> bool:
        """Tell whether `event` still fits. Free of charge: it looks at public numbers only."""
        return self._rule.holds(self._totals + self._rule.cost(event))

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
        totals = self._totals + self._rule.cost(event)
        if not self._rule.holds(totals):
            raise BudgetExhausted(
                f"the release must fit epsilon {self.epsilon:g} at delta {self.delta:g} ({self._rule.method}); got "
                f"{event!r} with {self.remaining():.3g} of the budget left; add noise, or stop here"
            )
        self._totals = totals
        if self._ledger is not None:
            self._ledger.charge(event, context=context)

    def remaining(self) -> float:
        """Return the part of the budget that is left, in [0, 1], in the units of the rule. A public number."""
        left = 1 - self._totals / self._rule.limits
        return max(0.0, float(left.min() if self._rule.every else left.max()))

    def bound(self) -> Bound:
        """Return what is guaranteed: the budget itself, however much of it was used."""
        return Bound(self.epsilon, self.delta, self._rule.method, (ADD_OR_REMOVE, ADAPTIVE_SCHEDULE))


def budget_filter(
    epsilon: float,
    delta: float,
    *,
    planned: Event,
    accountant: Accountant | None = None,
    ledger: Ledger | None = None,
) -> Filter:
    """Make the filter that fits a plan: exact for full-batch Gaussians, else one Renyi order erring low.

    Args:
        epsilon: the budget.
        delta: the budget.
        planned: about what will be released; it chooses the rule, it binds nobody.
        accountant: the accountant that prices the run; refused unless it is fit for adaptive choices.
        ledger: where charges go.

    Raises:
        ValueError: the accountant needs a schedule fixed in advance ("pld", "prv").
    """
    if accountant is not None and not accountant.adaptive:
        raise ValueError(
            f"accountant must be adaptive to feed a filter; got {accountant.name!r}, whose bound for what happened "
            "is exceeded 1.5 times in delta when parameters follow outputs; pass 'rdp', or fix the schedule"
        )
    items = priced(planned, ADD_REMOVE).pairs
    if items and total_mu(items) is not None:
        return Filter.of_gaussians(epsilon, delta, ledger=ledger)
    return Filter.at_order(epsilon, delta, order=choose_order(planned, epsilon, delta), ledger=ledger)


def choose_order(planned: Event, epsilon: float, delta: float, *, keep: float = 0.95) -> float:
    """Choose the lowest Renyi order that affords at least the part `keep` of what the best one does of `planned`.

    Too high an order is ruinous where the noise falls below the plan, too low an order is not. If the noise may
    fall far below it, plan with the least noise that will be used.

    Raises:
        ValueError: no order can afford anything at this budget.
    """
    _check_budget(epsilon, delta)
    limits, cost = _limits(ORDERS, epsilon, delta), _divergences(planned)
    if not (limits > 0).any():
        raise ValueError(
            f"epsilon must afford some order at delta={delta:g}; got {epsilon:g}; raise epsilon or delta"
        )
    affordable = np.maximum(limits, 0.0) / np.maximum(cost, 1e-300)
    good = (affordable >= keep * affordable.max()) & (limits > 0)
    return float(ORDERS[good].min())


def _renyi_rule(
    epsilon: float, delta: float, weights: Mapping[float, float], every: bool, name: str
) -> _Rule:
    _check_budget(epsilon, delta)
    orders = sorted(weights)
    if not orders or not all(order in ORDERS for order in orders) or min(weights.values()) <= 0:
        raise ValueError(
            f"orders must be among rdp.ORDERS with weights > 0; got {dict(weights)!r}; use choose_order()"
        )
    shares = np.array([min(1.0, weights[order]) for order in orders])
    limits = _limits(np.array(orders), epsilon, delta * shares)
    if not (limits > 0).any() or (every and not (limits > 0).all()):
        raise ValueError(
            f"orders must be affordable at epsilon={epsilon:g}, delta={delta:g}; got {orders}; raise the orders"
        )
    indices = np.searchsorted(np.sort(ORDERS), orders)
    places = np.argsort(ORDERS)[indices]
    config: dict[str, object] = {"rule": name, "orders": orders, "weights": shares.tolist()}
    listed = ", ".join(f"{order:g}" for order in orders)
    method = f"renyi filter, {name} of {listed}"
    return _Rule(lambda event: _divergences(event)[places], np.maximum(limits, 1e-300), every, config, method)


def _divergences(event: Event) -> Array:
    """The Renyi divergences of `event`; a slip in delta has no place in a Renyi budget."""
    curve = RDP().curve(event)
    if not curve.slip:
        return curve.values
    raise UnpricedEvent(
        f"a filter must be fed mechanisms with a Renyi price; got {event!r}, which costs delta {curve.slip:.3g} besides; "
        "sample by Poisson without a largest batch, or fix the schedule"
    )


def _limits(orders: Array, epsilon: float, delta: float | Array) -> Array:
    """The budget B(a, delta) of each order, rounded down."""
    a = orders
    limits = epsilon + (np.log(delta) + np.log(a)) / (a - 1) - np.log1p(-1 / a)
    return limits - _ROUNDING * (1 + epsilon - np.log(np.min(delta)) / (a - 1))


def _squared_mu(event: Event) -> Array:
    total = 0.0
    for leaf, count in priced(event, ADD_REMOVE).pairs:
        if not isinstance(leaf, Gaussian):
            raise ValueError(
                f"a gaussian filter must be fed full-batch Gaussians; got {leaf!r}; use Filter.at_order for samples"
            )
        total += count / leaf.noise_multiplier / leaf.noise_multiplier
    return np.array([total])


def _largest_mu(epsilon: float, delta: float) -> float:
    low, high = 0.0, 1.0
    while gaussian_delta(high, epsilon) <= delta:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, epsilon) <= delta else (low, middle)
    return low


def _declare(ledger: Ledger, config: dict[str, object]) -> None:
    """Write the rule into the ledger, or find it there unchanged."""
    declared = [attempt["filter"] for attempt in ledger.attempts if "filter" in attempt]
    if any(other != config for other in declared):
        raise ValueError(
            f"the filter of a ledger must never change; got {config}, declared before: {declared[0]}; "
            "make it as declared, or start a ledger of its own if the populations differ"
        )
    if not declared and ledger.num_charges:
        raise ValueError(
            f"a filter must be declared before the first charge; got a ledger with {ledger.num_charges} charges; "
            "its order was to be fixed before the data were seen: use a fixed schedule"
        )
    if not declared:
        ledger.attempt({"filter": config})


def _check_budget(epsilon: float, delta: float) -> None:
    if isinstance(epsilon, bool) or not (isinstance(epsilon, int | float) and 0 < epsilon < math.inf):
        raise ValueError(f"epsilon must be a finite number > 0; got {epsilon!r}; pass e.g. epsilon=2.0")
    if isinstance(delta, bool) or not (isinstance(delta, int | float) and 0 < delta < 1):
        raise ValueError(f"delta must be a number in (0, 1); got {delta!r}; pass e.g. delta=1e-5")
