# SPDX-License-Identifier: Apache-2.0
"""A run within a filter: its noise may be chosen as it goes, from what it released, and its promise still holds.

The two kinds of payments look alike to a run: `dpopt.budget.payments` holds it to prices that were fixed before it began,
this one asks the filter that governs the ledger (`accountants.filter`) before each charge.
"""

from __future__ import annotations

from dataclasses import dataclass

from accountants import BudgetExhausted, Event, Filter, Ledger, Record, budget_filter
from accountants.filter_rule import check_budget
from accountants.nests import shown
from dpopt.budget.payments import Rounds
from dpopt.budget.prices import Prices


@dataclass(frozen=True, slots=True)
class AdaptiveBudget:
    """The most that may be spent by releases whose noise is chosen from earlier ones: a filter on the whole ledger.

    The first run declares it on a new ledger, which it then governs for good. The filter's rule is chosen for `planned`,
    about what will be released (None: the first step of that run): take the least noise that will be used, as noise
    below the plan is dear. Nobody is bound to the plan.

        with PrivateTraining(..., budget=AdaptiveBudget(4.0, 1e-5)) as private:
            for batch in private.batches(data):
                private.mechanism = GaussianMechanism(controller(released))   # looks at released numbers only
                ...
                private.release()                        # raises BudgetExhausted where the step does not fit
    """

    epsilon: float
    delta: float
    planned: Event | None = None
    allow_large_delta: bool = False

    def __post_init__(self) -> None:
        check_budget(self.epsilon, self.delta)

    def filter(self, ledger: Ledger, first: Event) -> Filter:
        """The filter on `ledger`, for a run that begins with `first`: the one that governs it, or a new one.

        Raises:
            ValueError: one of another budget governs it, or something was charged without a filter.
        """
        rule = ledger.rule
        if rule is not None and (rule.epsilon, rule.delta) == (self.epsilon, self.delta):
            return Filter.of_ledger(ledger)
        planned = first if self.planned is None else self.planned
        trial = budget_filter(self.epsilon, self.delta, planned=planned, relation=ledger.relation)
        if not trial.would_accept(first):  # a ledger never loses a filter that nothing fits
            raise _exhausted(trial, first, 0, "a new one")
        return budget_filter(self.epsilon, self.delta, planned=planned, ledger=ledger)


@dataclass(slots=True)
class FilteredPayments:
    """The payments of one run on the ledger that `filter` governs; `event` is what the next charge pays for.

    Guarantees
    ----------
    Whatever the noise of each step was chosen from among released outputs, the run is private within the budget of
    the filter (test_guarantee_a_run_within_a_filter_may_choose_its_noise).
    """

    ledger: Ledger
    filter: Filter
    rounds: Rounds
    event: Event
    where: object
    _paid: Event | None = None

    @classmethod
    def begin(
        cls, ledger: Ledger, prices: Prices, length: int, budget: AdaptiveBudget, where: object
    ) -> FilteredPayments:
        """Those of a run that begins on `ledger`, with rounds of `length` steps.

        Raises:
            BudgetExhausted: not one charge fits.
        """
        event = prices.at(0)
        payments = cls(ledger, budget.filter(ledger, event), Rounds(length), event, where)
        payments._require_room(event, 0)
        return payments

    @property
    def budget(self) -> None:
        """No schedule was settled for it."""
        return None

    def settle(self, prices: Prices) -> None:
        """Go on at other prices."""
        self.event = prices.at(self.rounds.charged)

    def number(self, draw: int | None) -> int:
        """The number, in this run, of the charge that pays for `draw`; None: of the next charge."""
        return self.rounds.number(draw)

    @property
    def steps_left(self) -> int:
        """Releases that the filter still affords at the present noise."""
        return self.rounds.steps(self.filter.affords(self.event))

    def settled(self, steps: int | None, done: int) -> int:
        """The number of steps to run, after `done`: `steps`, or all that the filter affords at the present noise."""
        if steps is None:
            self._require_room(self.event, done)
        return self.steps_left if steps is None else steps

    def check(self, draw: int, event: Event, done: int) -> None:
        """Refuse to release `draw` where it is past, costs something else than was paid, or does not fit."""
        self.rounds.require_open(draw)
        if self.rounds.is_paid(draw):
            if event != self._paid:
                raise RuntimeError(
                    f"expected the mechanism that the whole round was paid for, {self._paid}; got {shown(event)}; change the "
                    "noise between two rounds"
                )
            return
        self._require_room(event, done)
        self.event = event

    def pay(self, draw: int, step: int) -> Record:
        """Charge the round of `draw` with what was checked last, or note that it is paid for; durable on return.

        Raises:
            BudgetExhausted: another run on this ledger was faster.
        """
        number, place = self.rounds.place(draw)
        context = {"step": step, "round": number, "place": place}
        if self.rounds.is_paid(draw):
            return self.ledger.note("a step of a round that is paid for", context=context)
        record = self.ledger.charge(self.event, context=context)
        self._paid = self.event
        self.rounds.pay(draw)
        return record

    def _require_room(self, event: Event, done: int) -> None:
        if not self.filter.would_accept(event):
            raise _exhausted(self.filter, event, done, self.where)


def _exhausted(budget: Filter, event: Event, done: int, where: object) -> BudgetExhausted:
    return BudgetExhausted(
        f"expected a step that fits epsilon {budget.epsilon:g} at delta {budget.delta:g}; got {shown(event)} with "
        f"{100 * budget.remaining():.3g} % of the filter's budget left after {done} step(s) of this run; raise the noise "
        f"multiplier, lower the sampling rate, or stop here (nothing was charged; ledger {where})"
    )


def refuse_governed(ledger: Ledger, where: object) -> None:
    """Raise ValueError where a filter governs the ledger of a run whose schedule is fixed in advance."""
    rule = ledger.rule
    if rule is not None:
        raise ValueError(
            f"expected a ledger without a filter, for a run at a fixed noise; got {where}, which a filter of epsilon "
            f"{rule.epsilon:g} at delta {rule.delta:g} governs; spend through it, PrivateTraining(..., "
            f"budget=AdaptiveBudget({rule.epsilon!r}, {rule.delta!r})), or give this run a ledger of its own"
        )
