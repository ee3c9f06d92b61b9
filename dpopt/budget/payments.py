# SPDX-License-Identifier: Apache-2.0
"""What a run pays and what it still affords: one charge for each round that it releases from, within a budget.

A round is the draws that one charge pays for: one draw, or an epoch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from accountants import Accountant, Event, Ledger, Record
from dpopt.budget.budget import Budget, exhausted
from dpopt.budget.prices import Prices
from dpopt.public_numbers import check_real
from dpopt.sampling.sampler import Sampling


class Draw(NamedTuple):
    """The indices of one batch, and its number among the draws of the run."""

    indices: list[int]
    number: int


@dataclass(slots=True)
class Rounds:
    """The draws of one run, cut into rounds of `length` draws, each of which one charge pays for.

    Payment goes by the round that was *drawn*: a draw that was never released leaves the numbers of those behind it
    as they are, so no charge can reach into the next round.

    Guarantees
    ----------
    No draw is released twice, and none before its round is paid for, once
    (test_guarantee_a_round_is_paid_for_once_and_before_its_first_release,
    test_guarantee_no_draw_is_released_twice).
    """

    length: int
    drawn: int = 0
    over: int = 0
    """Draws below this number are past: released, failed or passed over."""
    charged: int = 0
    _paid: int = -1
    _size: int = 0

    def next(self, num_records: int) -> int:
        """The number of a new draw out of `num_records`, the same for a whole round: a partition is one of them."""
        if self.place(self.drawn)[1] and num_records != self._size:
            raise RuntimeError(
                "expected one dataset for the whole round; got one of another length, whose records may have been in an "
                "earlier batch of it; draw the rest of the round, or begin a new run"
            )
        self._size = num_records
        self.drawn += 1
        return self.drawn - 1

    def place(self, draw: int) -> tuple[int, int]:
        """The round of a draw, and its place there."""
        return divmod(draw, self.length)

    def number(self, draw: int | None) -> int:
        """The number of the charge that pays for `draw`; None: of the next charge."""
        return self.charged - (draw is not None and self.is_paid(draw))

    def is_paid(self, draw: int) -> bool:
        """Whether the round of this draw has been charged."""
        return self.place(draw)[0] == self._paid

    def pay(self, draw: int) -> None:
        """The round of this draw has been charged."""
        self._paid = self.place(draw)[0]
        self.charged += 1

    def close(self, draw: int) -> None:
        """Draw `draw` is about to be released, and never again."""
        self.require_open(draw)
        self.over = draw + 1

    def require_open(self, draw: int) -> None:
        """Raise RuntimeError for a draw that is past."""
        if not self.over <= draw < self.drawn:
            raise RuntimeError(
                "expected a batch drawn since the last release; got one that is past, whose price covers one release; "
                "draw the next one"
            )

    def steps(self, charges: int) -> int:
        """Releases that `charges` more charges afford from here on, the rest of a paid round included."""
        done = self.over % self.length
        rest = self.length - done if self.is_paid(self.over) else 0
        return rest + max(0, charges * self.length - (0 if rest else done))


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
    _first: Event

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
        payments = cls(
            ledger, prices, Rounds(length), budget, None, where, rule, ledger.num_charges, prices.at(0)
        )
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
        if prices is not None:
            self.prices, self._first = prices, prices.at(0)
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
        return self._first if self.prices.constant else self.prices.at(self.number(draw))

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
