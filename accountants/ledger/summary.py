# SPDX-License-Identifier: Apache-2.0
"""What a verified ledger tells at a glance: its runs, what each charged, what was repaired, and what is unfinished."""

from collections.abc import Mapping
from dataclasses import dataclass

from accountants.events import Composed
from accountants.records import History, Record, charged


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of a ledger: the number of its first record, its public configuration, and what it charged.

    `repaired` are the charges, counted by the next run, for a line that this one left unfinished.
    """

    seq: int
    config: Mapping[str, object]
    num_charges: int
    repaired: int


@dataclass(frozen=True, slots=True)
class Summary:
    """A ledger as a whole.

    `resumes` are the runs after the first. `forks` are the runs that named, under `head` in their configuration, a
    state of training older than the ledger's last charge: the steps since then were taken on another branch. It is
    None where no run named one. `torn` bytes follow the last whole line: a writer is at work, or died there.
    """

    id: str
    unit: str
    relation: str
    head: str
    num_records: int
    num_charges: int
    attempts: tuple[Attempt, ...]
    outside: Attempt | None
    forks: int | None
    repaired: tuple[int, ...]
    repaired_notes: tuple[int, ...]
    torn: int
    event: Composed

    @property
    def resumes(self) -> int:
        """The runs that continued the ledger."""
        return max(0, len(self.attempts) - 1)


def summary(history: History) -> Summary:
    """Summarise what `read` returned."""
    header, *records = history.records
    repaired = [record for record in records if _is_repair(record)]
    outside, attempts = _attempts(records)
    return Summary(
        id=str(header.payload.get("id")),
        unit=history.unit,
        relation=history.relation,
        head=history.records[-1].hash,
        num_records=len(history.records),
        num_charges=sum(record.kind == "charge" for record in records),
        attempts=attempts,
        outside=outside,
        forks=_forks(history.records),
        repaired=tuple(record.seq for record in repaired if record.kind == "charge"),
        repaired_notes=tuple(record.seq for record in repaired if record.kind == "note"),
        torn=len(history.torn),
        event=charged(history.records),
    )


def place_of(history: History, head: str) -> int | None:
    """The number of the record whose hash is `head`; None where it never was this ledger's head."""
    return next((record.seq for record in history.records if record.hash == head), None)


def _attempts(records: list[Record]) -> tuple[Attempt | None, tuple[Attempt, ...]]:
    """The records before the first attempt, if they hold charges, and the attempts."""
    # A repair is written when a ledger is opened, so it comes before the attempt that opened it.
    runs: list[list[Record]] = [[]]
    for record in records:
        if record.kind == "attempt":
            runs.append([record])
        else:
            runs[-1].append(record)
    before, *others = [_attempt(run) for run in runs]
    return (before if before.num_charges else None), tuple(others)


def _attempt(run: list[Record]) -> Attempt:
    config = run[0].payload.get("config") if run and run[0].kind == "attempt" else None
    charges = [record for record in run if record.kind == "charge"]
    return Attempt(
        run[0].seq if run else 0,
        config if isinstance(config, Mapping) else {},
        len(charges),
        sum(_is_repair(record) for record in charges),
    )


def _is_repair(record: Record) -> bool:
    context = record.payload.get("context")
    return "repaired" in record.payload or (isinstance(context, Mapping) and "repaired" in context)


def _forks(records: tuple[Record, ...]) -> int | None:
    """The attempts that continue from before the last charge; None where no attempt says from where."""
    known = {record.hash: record.seq for record in records}
    last_charge, forks = -1, None
    for record in records:
        config = record.payload.get("config")
        if record.kind == "charge":
            last_charge = record.seq
        elif isinstance(config, Mapping) and "head" in config:
            behind = known.get(str(config["head"]), -1) < last_charge
            forks = (forks or 0) + behind
    return forks
