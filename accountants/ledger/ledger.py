# SPDX-License-Identifier: Apache-2.0
"""The durable ledger: an append-only, hash-chained file of everything ever charged to one population.

The law of this file: **a charge is on disk before the noise it pays for is drawn**. A crash, a kill, a full
disk or a resumed run can count a release twice; none can lose one.

One JSON object per line: `seq`, `kind`, `payload`, `prev`, `hash`, where `hash` is the SHA-256 of the rest and
`prev` the hash of the line before. The ledger belongs to the *dataset*, not to a checkpoint: going back to an
older checkpoint never gives charges back. It holds events and public configuration only; never keys, random
states or records.

One ledger, one rule: its header says which datasets are neighbours, and a filter declared on it before its first
charge (`accountants.filter`) decides about every later one, whoever asks, under the lock of the ledger.

**What is seen, and what is not.** The chain has no key. It shows a changed, missing, swapped or repeated line in
the middle; a file that is moved, replaced, cut or written by another while it is open; a second writer; a fork. By
itself it cannot show
- a history that somebody wrote anew with hashes computed again: a forgery;
- an old copy of the whole file put back between two runs, or lines cut off whole at its end: a rollback;
- a copy of the file that is continued elsewhere, or a ledger that was never shown.
All of them lack hashes that the true file has. So keep `head` where whoever may alter the ledger cannot write: in a
report, a notebook, a signed message. `knows(head)`, or `dpopt ledger verify FILE --head HASH`, then tells whether
everything up to that head is still there; what came after it is not covered.
"""

import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from accountants.events import Composed, Event, UnpricedEvent
from accountants.filter_rule import Rule, declared_rule, refuse_late
from accountants.formats.event_json import to_dict
from accountants.ledger.spending import Spending
from accountants.methods.rdp import RDP
from accountants.records import FORMAT, Chain, Record, Scalar, check_header, event_of, following, to_line
from accountants.relations import ADD_REMOVE, relation_named, require_charged_under
from accountants.storage import AppendedFile, LedgerCorrupt, open_locked


class Ledger:
    """The single writer of a ledger file. Open it with `Ledger.open`, close it or use it in a `with` block.

    Guarantees:
        - durable before return: when `charge` returns, the record has been written and synchronised to disk.
        - no charge is ever lost: kill -9, torn lines and full disks over-count by at most one charge each.
        - single writer: a second `open` is refused, and so is a forked child.
        - in its place: what `charge` acknowledges is in the file that the path leads to, not in one moved away.
        - one rule: a filter declared on the ledger decides about every charge, from whichever object and thread.
        - tamper evident: a changed byte is refused with its line number.
    """

    __slots__ = (
        "_attempts",
        "_charged",
        "_declared",
        "_file",
        "_hashes",
        "_header",
        "_last",
        "_mutex",
        "_spending",
    )

    def __init__(self, file: AppendedFile, records: Iterable[Record]) -> None:
        self._file, self._mutex = file, threading.Lock()
        self._spending = Spending()
        self._attempts: list[Mapping[str, object]] = []
        self._declared: set[Event] = set()
        self._charged: tuple[Event | None, Mapping[str, object]] = None, {}
        self._hashes: set[str] = set()
        for record in records:
            self._note_in_memory(record)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        unit: str = "record",
        relation: str = ADD_REMOVE,
        new: bool = False,
        expected: Event | None = None,
    ) -> Self:
        """Create the ledger at `path`, or continue it after verifying every line.

        Args:
            path: the file; its directory must exist.
            unit: the unit of privacy, e.g. "record" or "user".
            relation: what makes two datasets neighbours, one of `relations.RELATIONS`.
            new: create it, and refuse a file that exists.
            expected: what is about to be charged; it prices an unfinished line where nothing dearer is known.

        Raises:
            FileExistsError: it exists and `new` was asked for.
            LedgerLocked: another process (or this one) has it open.
            LedgerCorrupt: a line does not verify, and the message gives its number; or it is no regular file.
            LedgerNotDurable: the header or a repair could not be written.
            ValueError: the file was made for another unit or relation, or a filter on it is unknown here.
        """
        path = Path(path)
        payload = {"format": FORMAT, "id": secrets.token_hex(16), "unit": unit, "relation": relation}
        header = to_line(following(None, "header", payload))
        fd, _ = open_locked(path, header, new=new)
        file = AppendedFile(fd, path)
        try:
            chain = Chain(str(path))
            with file.reader() as reader:
                ledger = cls(file, chain.records(reader))
                file.continue_at(reader.tell() - len(chain.torn), reader.tell())
            check_header(ledger._header, unit, relation, str(path))
            if chain.torn:
                ledger._repair(chain.torn, expected, str(path))
            return ledger
        except BaseException:
            file.close()
            raise

    def _repair(self, torn: bytes, expected: Event | None, where: str) -> None:
        """Count the line that was being written when the last writer died, then remove its remains.

        Its charge had not been acknowledged, so nothing was released for it; it is counted all the same, as
        the dearest event known, or the dearest that a filter has room for. The repair overwrites the remains in place
        and only then cuts off the rest: a crash in between leaves a torn line again, which is counted again.
        """
        note = {"repaired": len(torn)}
        prefix = f'{{"seq":{self._last.seq + 1},"kind":'
        harmless = torn.startswith((f'{prefix}"note"'.encode(), f'{prefix}"attempt"'.encode()))
        known = {*self._spending.known, *self._declared, *([expected] if expected else [])}
        fitting = [event for event in known if self._fits(event)]
        if not (known or harmless):
            raise LedgerCorrupt(
                f"{where} must end in a whole line; got {len(torn)} bytes of a first charge whose event is "
                "unknown; nothing was released for it: remove these bytes by hand, or restore a copy"
            )
        if harmless or not fitting:
            self._append("note", note)
        else:
            dearest = max(fitting, key=lambda event: _price(event, self.relation))
            self._append("charge", {"event": to_dict(dearest), "context": note}, dearest)
        self._file.cut_off()

    def _fits(self, event: Event) -> bool:
        try:
            return self._spending.has_room(event)
        except ValueError:  # the rule has no price for it, so it was not what was being charged
            return False

    def charge(self, event: Event, *, context: Mapping[str, Scalar] | None = None) -> Record:
        """Append `event` and make it durable. Draw the noise only after this has returned.

        Args:
            event: what is about to be released.
            context: public numbers beside it, e.g. {"step": 17}.

        Raises:
            BudgetExhausted: a filter governs the ledger, and it does not fit; nothing was charged, release nothing.
            LedgerNotDurable: it could not be written; nothing may be released.
            UnpricedEvent: it was charged under another relation, is too deep a nest, or the filter has no price for it.
        """
        if (
            event is not self._charged[0]
        ):  # an event does not change: what was asked of the last one still holds
            require_charged_under(event, self.relation)
            self._charged = event, to_dict(event)
        payload = {"event": self._charged[1], "context": dict(context or {})}
        return self._append("charge", payload, event)

    def attempt(self, config: Mapping[str, object], *, event: Event | None = None) -> Record:
        """Append the start (or resumption) of a run: its public configuration, and the event it will charge."""
        if "filter" in config:
            raise ValueError(
                "config must not declare a filter by itself; got one; make the filter with ledger=, which declares it"
            )
        return self._append("attempt", {"config": dict(config), "event": event and to_dict(event)}, event)

    def note(self, text: str, *, context: Mapping[str, Scalar] | None = None) -> Record:
        """Append a remark that costs nothing, e.g. that a checkpoint was written."""
        return self._append("note", {"text": text, "context": dict(context or {})})

    def govern(self, rule: Rule) -> None:
        """Let the rule of a filter decide about every charge from now on, for good; `Filter` asks for it.

        Raises:
            ValueError: another rule governs already, or something was charged without one.
        """
        with self._alone():
            present = self._spending.rule
            if present is not None and (present.config, present.relation) != (rule.config, rule.relation):
                raise ValueError(
                    f"the filter of a ledger must never change; got {rule.config}, declared before: {present.config}; "
                    "make it as declared, or start a ledger of its own if the populations differ"
                )
            if present is None:
                refuse_late(self.num_charges)
                self._write("attempt", {"config": {"filter": rule.config}, "event": None})

    def events(self) -> Composed:
        """Return everything charged so far as one event, equal charges merged, under the relation of the header.

        An accountant of another relation refuses it; `ledger_bound` prices it as the header says.
        """
        return self._spending.events(self.relation)

    @property
    def spending(self) -> Spending:
        """What was charged and what the filter has room for; to look at, not to change."""
        return self._spending

    @property
    def rule(self) -> Rule | None:
        """The rule of the filter that governs the ledger; None where schedules were fixed in advance."""
        return self._spending.rule

    @property
    def relation(self) -> str:
        """Which datasets are neighbours: the name of the relation that the header states."""
        return relation_named(str(self._header.payload["relation"]))

    @property
    def unit(self) -> str:
        """What one record of the data is, as the header says."""
        return str(self._header.payload["unit"])

    @property
    def attempts(self) -> tuple[Mapping[str, object], ...]:
        """The public configurations of all attempts, in order."""
        return (*self._attempts,)

    @property
    def id(self) -> str:
        """The random name given to the ledger at its creation."""
        return str(self._header.payload["id"])

    @property
    def head(self) -> str:
        """The hash of the last record; it commits to the whole history."""
        return self._last.hash

    @property
    def num_charges(self) -> int:
        """The number of charges ever made, repairs included."""
        return self._spending.num_charges

    def knows(self, head: str) -> bool:
        """Tell whether `head` was ever the head of this ledger: False after a rollback or in a copy's branch."""
        return head in self._hashes

    def close(self) -> None:
        """Release the lock and the file. Idempotent."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        # Asked first: a child forked while another thread held the lock would wait for it forever.
        self._file.require_own()
        with self._mutex:
            self._file.require_usable()
            yield

    def _append(self, kind: str, payload: Mapping[str, object], event: Event | None = None) -> Record:
        with self._alone():
            if event is not None and kind == "charge":
                self._spending.require_room(event)
            return self._write(kind, payload, event)

    def _write(self, kind: str, payload: Mapping[str, object], event: Event | None = None) -> Record:
        record = replace(following(self._last, kind, payload), event=event)
        line = to_line(record)
        self._file.require_untouched()
        try:
            self._file.append(line)
        finally:
            # The bytes of a failed write may have reached the disk all the same: count them.
            self._note_in_memory(record)
        self._file.confirm()
        return record

    def _note_in_memory(self, record: Record) -> None:
        self._last = record
        self._hashes.add(record.hash)
        event = event_of(record) if record.event is None else record.event
        if record.kind == "header":
            self._header = record
        elif record.kind == "charge" and event is not None:
            self._spending.add(event)
        elif record.kind == "attempt":
            if isinstance(config := record.payload.get("config"), Mapping):
                self._attempts.append(config)
                if "filter" in config:
                    refuse_late(self.num_charges)
                    self._spending.govern(declared_rule(self._attempts, self.relation))
            if event is not None:
                self._declared.add(event)


def _price(event: Event, relation: str) -> float:
    try:
        return RDP(relation=relation).curve(event).epsilon(1e-6)
    except (UnpricedEvent, ValueError):
        return float("inf")
