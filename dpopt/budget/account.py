# SPDX-License-Identifier: Apache-2.0
"""The account of a run: its ledger, what is paid from it, and what everything on it is worth."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from accountants import Accountant, Bound, Event, Ledger, ledger_bound
from dpopt.budget.budget import Budget
from dpopt.budget.declaration import declared_assumptions, refuse_changed
from dpopt.budget.filtered import AdaptiveBudget, FilteredPayments, refuse_governed
from dpopt.budget.ledger_files import SharedLedger, default_ledger, insecurity, opened
from dpopt.budget.payments import Payments
from dpopt.budget.prices import Prices


@dataclass(slots=True)
class Account:
    """A ledger at `path`, or by `default` in a new file, or the `shared` one, that `rule` prices within `budget`.

    Another configuration than that of the ledger's last run is refused, unless `new_configuration`.
    """

    path: Path
    default: bool
    unit: str
    relation: str
    rule: Accountant
    budget: Budget | AdaptiveBudget | None
    new_configuration: bool
    shared: SharedLedger | None = None
    _payments: Payments | FilteredPayments | None = None

    @classmethod
    def at(
        cls,
        path: str | Path | SharedLedger | None,
        *,
        unit: str,
        relation: str,
        rule: Accountant,
        budget: Budget | AdaptiveBudget | None,
        new_configuration: bool,
    ) -> Account:
        """One at `path`, or at the first free place."""
        shared = path if isinstance(path, SharedLedger) else None
        given = path.path if isinstance(path, SharedLedger) else path
        where = default_ledger() if given is None else Path(given)
        return cls(where, given is None, unit, relation, rule, budget, new_configuration, shared)

    @property
    def was_open(self) -> bool:
        """Whether a run has begun on it."""
        return self._payments is not None

    @property
    def payments(self) -> Payments | FilteredPayments:
        """The rounds of this run, and what was paid for them."""
        if self._payments is None:
            raise RuntimeError("expected an open run; got one not entered yet; use it in a `with` statement")
        return self._payments

    @property
    def ledger(self) -> Ledger:
        """The open ledger."""
        return self.payments.ledger

    def open(self, expected: Event) -> Ledger:
        """Open the ledger for a run that will charge `expected`."""
        if self.shared is not None:
            self.path, ledger = self.shared.open(unit=self.unit, relation=self.relation, expected=expected)
            return ledger
        given = None if self.default else self.path
        self.path, ledger = opened(given, unit=self.unit, relation=self.relation, expected=expected)
        self.default = False  # entered again, the run continues its ledger
        return ledger

    def begin(self, ledger: Ledger, config: Mapping[str, object], prices: Prices, length: int) -> None:
        """Check configuration and budget, and note the run on the ledger; `length` is that of a round.

        Within a filter any configuration may follow any other.
        """
        if isinstance(self.budget, AdaptiveBudget):
            self._payments = FilteredPayments.begin(ledger, prices, length, self.budget, self.path)
        else:
            refuse_governed(ledger, self.path)
            if not self.new_configuration:
                refuse_changed(ledger.attempts, config, self.path)
            self._payments = Payments.begin(ledger, prices, length, self.budget, self.rule, self.path)
        ledger.attempt(config, event=prices.at(0))

    def tell(self) -> None:
        """Print where the ledger is."""
        print(f"dpopt: the privacy ledger of this run is {self.path}", file=sys.stderr)

    def close(self) -> None:
        """Close the ledger, if it is open and this run's alone."""
        if self._payments is not None:
            self.give_up(self._payments.ledger)

    def give_up(self, ledger: Ledger) -> None:
        """Close `ledger` unless other runs share it."""
        if self.shared is None:
            ledger.close()

    def bound(self, delta: float) -> Bound:
        """Upper bound on epsilon of everything on the ledger so far, with its method and assumptions.

        Where a filter governs it, that is the filter's guarantee, however much was spent.
        """
        rule = self.rule if self.ledger.rule is None else None
        bound = ledger_bound(self.ledger, delta, accountant=rule)
        attempts = self.ledger.attempts
        said = (*bound.assumptions, *declared_assumptions(attempts), *insecurity(attempts))
        return replace(bound, assumptions=said)
