# SPDX-License-Identifier: Apache-2.0
"""What a run pays and what it still affords: one charge for each round that it releases from, within a budget."""

from __future__ import annotations

from dataclasses import dataclass

from accountants import Accountant, Event, Ledger, Record
from dpopt.budget import Budget, exhausted
from dpopt.estimators.prices import Prices
from dpopt.rounds import Rounds


@dataclass(slots=True)
class Payments:
    """The payments of one run: `prices` of its rounds, on `ledger`, at most `most` of them (None: no budget)."""

    ledger: Ledger
    prices: Prices
    rounds: Rounds
    budget: Budget | None
    most: int | None
    where: object

    @classmethod
    def begin(
        cls,
        ledger: Ledger,
        prices: Prices,
        length: int,
        budget: Budget | None,
        rule: Accountant,
        where: object,
    ) -> Payments:
        """Those of a run that begins on `ledger`, with rounds of `length` steps priced by `rule`.

        Raises:
            BudgetExhausted: not one charge fits.
        """
        rounds = Rounds(length)
        if budget is None:
            return cls(ledger, prices, rounds, None, None, where)
        most = prices.affordable(budget, rule, ledger.events())
        if most < 1:
            raise exhausted(budget, 1, 0, 0, where)
        return cls(ledger, prices, rounds, budget, most, where)

    def number(self, draw: int | None) -> int:
        """The number, in this run, of the charge that pays for `draw`; None: of the next charge."""
        return self.rounds.number(draw)

    def event(self, draw: int) -> Event:
        """What the charge for `draw` pays for."""
        return self.prices.at(self.number(draw))

    @property
    def steps_left(self) -> int | None:
        """Releases that the budget still affords; None without one."""
        return None if self.most is None else self.rounds.steps(self.most - self.rounds.charged)

    def settled(self, steps: int | None, done: int) -> int:
        """The number of steps to run, after `done`: `steps`, or all that the budget affords."""
        left = self.steps_left
        wanted = left if steps is None else steps
        if wanted is None:
            raise ValueError(
                "expected a number of steps, or a budget that ends the run; got neither; pass steps="
            )
        if self.budget is not None and left is not None and wanted > left:
            raise exhausted(self.budget, wanted, left, done, self.where)
        return wanted

    def check(self, draw: int, event: Event, done: int) -> None:
        """Refuse to release `draw` where it is past, costs something else, or is beyond the budget."""
        due = self.event(draw)
        if event != due:
            raise RuntimeError(
                f"expected the mechanism and sampling that the run began with, {due}; got {event}, which the "
                "budget was not computed for; start a run of its own on the same ledger"
            )
        self.rounds.require_open(draw)
        if self.budget is not None and self.most == self.rounds.charged and not self.rounds.is_paid(draw):
            raise exhausted(self.budget, 1, 0, done, self.where)

    def pay(self, draw: int, step: int) -> Record:
        """Charge the round of `draw`, or note that it is paid for; durable when this returns.

        The number of the record is that of no other release on the ledger.
        """
        number, place = self.rounds.place(draw)
        context = {"step": step, "round": number, "place": place}
        if self.rounds.is_paid(draw):
            return self.ledger.note("a step of a round that is paid for", context=context)
        record = self.ledger.charge(self.event(draw), context=context)
        self.rounds.pay(draw)
        return record
