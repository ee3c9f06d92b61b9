# SPDX-License-Identifier: Apache-2.0
"""What a run pays and what it still affords: one charge for each round that it releases from, within a budget."""

from __future__ import annotations

from dataclasses import dataclass

from accountants import Accountant, Event, Ledger, Record
from dpopt.budget.budget import Budget, exhausted
from dpopt.budget.prices import Prices
from dpopt.budget.rounds import Rounds
from dpopt.public_numbers import check_real
from dpopt.sampling.sampler import Sampling


@dataclass(slots=True)
class Payments:
    """The payments of one run: `prices` of its rounds, on `ledger`, at most `most` of them (None: no budget).

    `others` are the charges of the ledger that were not this run's when `most` was computed by `rule`.
    """

    ledger: Ledger
    prices: Prices
    rounds: Rounds
    budget: Budget | None
    most: int | None
    where: object
    rule: Accountant
    others: int

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
        payments = cls(ledger, prices, Rounds(length), budget, None, where, rule, ledger.num_charges)
        payments.settle()
        if budget is not None and payments.most is not None and payments.most < 1:
            raise exhausted(budget, 1, 0, 0, where)
        return payments

    def settle(self, prices: Prices | None = None) -> None:
        """Compute anew how many rounds the budget affords, as others have charged, or at new `prices` from now on.

        Guarantees
        ----------
        Runs that share a ledger stay within each one's budget, whoever charges first
        (test_guarantee_runs_on_one_ledger_count_each_others_charges).
        """
        done = self.rounds.charged
        self.prices = self.prices if prices is None else prices
        self.others = self.ledger.num_charges - done
        if self.budget is not None:
            spent = self.ledger.events()
            self.most = done + self.prices.behind(done).affordable(self.budget, self.rule, spent)

    def _follow(self) -> None:
        if self.budget is not None and self.ledger.num_charges != self.others + self.rounds.charged:
            self.settle()

    def number(self, draw: int | None) -> int:
        """The number, in this run, of the charge that pays for `draw`; None: of the next charge."""
        return self.rounds.number(draw)

    def event(self, draw: int) -> Event:
        """What the charge for `draw` pays for."""
        return self.prices.at(self.number(draw))

    @property
    def steps_left(self) -> int | None:
        """Releases that the budget still affords; None without one."""
        self._follow()
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
        self._follow()
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


def require_variable(budget: Budget | None, sampling: Sampling, noise_multiplier: float) -> None:
    """Refuse to change the noise to `noise_multiplier` where the rest of the run was settled with another.

    Raises:
        ValueError: there is a budget, a charge pays for more than one step, or it is no noise.
    """
    if budget is not None:
        raise ValueError(
            "expected a run without a budget where the noise varies; got a budget, whose noise multiplier was computed "
            'for all steps; give the schedule to the budget, as in clipping="schedule:steps=1000,noise_end=0.7", or a noise '
            "multiplier in place of the target"
        )
    if sampling.steps_per_charge > 1:
        raise ValueError(
            "expected a sampler that draws each step anew where the noise varies; got "
            f"{type(sampling).__name__}, whose charges pay for a whole epoch; use Poisson sampling"
        )
    check_real("noise_multiplier", noise_multiplier)
    if not noise_multiplier > 0:
        raise ValueError(
            f"expected a schedule with a noise multiplier > 0; got {noise_multiplier}, which would publish a step as it "
            "is; let it end above 0"
        )
