# SPDX-License-Identifier: Apache-2.0
"""The lines of a ledger: how one is hashed, written, read back and verified. No lock is taken here."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accountants.events import Composed, Event, Repeated, from_dict

FORMAT = 1
"""The version of the file format, written into the header."""
KINDS = ("header", "attempt", "charge", "note")
_FIRST = "0" * 64

Scalar = str | int | float | bool | None


class LedgerCorrupt(ValueError):
    """A ledger file does not verify; the message gives the line."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line: its number from 0, its kind, its content, the hash of the line before, and its own."""

    seq: int
    kind: str
    payload: Mapping[str, object]
    prev: str
    hash: str


@dataclass(frozen=True, slots=True)
class History:
    """A verified ledger as read: its records, and the bytes of an unfinished last line (usually none)."""

    records: tuple[Record, ...]
    torn: bytes


def following(last: Record | None, kind: str, payload: Mapping[str, object]) -> Record:
    """Make the record that comes after `last` (None: the first).

    Raises:
        ValueError: the payload is no plain finite JSON data.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}; use note for anything else")
    try:
        plain = json.loads(json.dumps(payload, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a payload must be finite JSON data; got {error}; pass numbers and strings only"
        ) from error
    seq, prev = (0, _FIRST) if last is None else (last.seq + 1, last.hash)
    return Record(seq, kind, plain, prev, _digest(seq, kind, plain, prev))


def to_line(record: Record) -> bytes:
    """Write the record as its line, line feed included."""
    fields = {name: getattr(record, name) for name in Record.__slots__}
    return _canonical(fields) + b"\n"


def parse(data: bytes, where: str) -> tuple[tuple[Record, ...], bytes]:
    """Verify the bytes of a ledger: its records, and what follows the last line feed.

    Raises:
        LedgerCorrupt: a line does not verify, or there is not even a header.
    """
    *lines, torn = data.split(b"\n")
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        record = _parse_line(line, number, where)
        expected = following(records[-1] if records else None, record.kind, record.payload)
        if record != expected:
            raise _corrupt(where, number, "its place and hash do not continue the chain")
        if (record.kind == "header") != (number == 1):
            raise _corrupt(where, number, f"kind {record.kind!r} in this place")
        _check_event(record, number, where)
        records.append(record)
    if not records:
        raise _corrupt(where, 1, "no header: the file is empty or was cut off")
    return tuple(records), torn


def read(path: str | os.PathLike[str]) -> History:
    """Read and verify a ledger without locking it; a writer may be at work, hence `History.torn`.

    Raises:
        LedgerCorrupt: a line does not verify; the message gives its number.
    """
    return History(*parse(Path(path).read_bytes(), str(path)))


def verify(path: str | os.PathLike[str]) -> str:
    """Verify a ledger and return its head; compare it with one kept elsewhere.

    Raises:
        LedgerCorrupt: a line does not verify, or the last one is unfinished.
    """
    history = read(path)
    if history.torn:
        raise _corrupt(str(path), len(history.records) + 1, "unfinished: a writer is at work, or died here")
    return history.records[-1].hash


def charged(records: tuple[Record, ...]) -> Composed:
    """Return everything the records charge as one event, equal charges merged."""
    counts: Counter[Event] = Counter()
    for record in records:
        event = event_of(record)
        if record.kind == "charge" and event is not None:
            counts[event] += 1
    return Composed(tuple(Repeated(event, count) for event, count in counts.items()))


def event_of(record: Record) -> Event | None:
    """Return the event that a charge pays for, or that an attempt declares."""
    data = record.payload.get("event") if record.kind in ("charge", "attempt") else None
    return from_dict(data) if isinstance(data, Mapping) else None


def check_header(header: Record, unit: str, relation: str, where: str) -> None:
    """Refuse to continue a ledger that was made for another format, unit or relation."""
    for name, expected in (("format", FORMAT), ("unit", unit), ("relation", relation)):
        got = header.payload.get(name)
        if got != expected:
            raise ValueError(
                f"{name} of {where} must be {expected!r} to be continued; got {got!r}; use another ledger file"
            )


def _canonical(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()


def _digest(seq: int, kind: str, payload: Mapping[str, object], prev: str) -> str:
    fields = {"seq": seq, "kind": kind, "payload": payload, "prev": prev}
    return hashlib.sha256(_canonical(fields)).hexdigest()


def _parse_line(line: bytes, number: int, where: str) -> Record:
    try:
        fields = json.loads(line)
        record = Record(**fields)
        whole = to_line(record)[:-1] == line and isinstance(record.payload, dict) and record.kind in KINDS
    except (ValueError, TypeError, RecursionError) as error:
        raise _corrupt(where, number, f"not a record ({error})") from error
    if not whole:
        raise _corrupt(where, number, "not written by a ledger")
    return record


def _check_event(record: Record, number: int, where: str) -> None:
    try:
        event = event_of(record)
    except ValueError as error:
        raise _corrupt(where, number, str(error)) from error
    if record.kind == "charge" and event is None:
        raise _corrupt(where, number, "a charge without an event")


def _corrupt(where: str, number: int, got: str) -> LedgerCorrupt:
    return LedgerCorrupt(
        f"{where} must be an unbroken chain of records; got line {number}: {got}; restore the file from a copy, "
        "and treat whatever it covered as spent"
    )
