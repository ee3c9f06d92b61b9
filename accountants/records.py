# SPDX-License-Identifier: Apache-2.0
"""The lines of a ledger: how one is hashed, written, read back and verified. No lock is taken here.

A line is read once, as it stands: its hash is that of its own bytes, and each part of its payload must be written as
`json` would write it, so that no two lines mean the same. Equal events are parsed once and are then one object.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO

from accountants.events import Composed, Event, Repeated
from accountants.filter_rule import Rule, declared_rule, refuse_late
from accountants.formats.event_json import from_dict
from accountants.relations import relation_named
from accountants.storage import LedgerCorrupt, open_for_reading

FORMAT = 1
"""The version of the file format, written into the header."""
KINDS = ("header", "attempt", "charge", "note")
_FIRST = "0" * 64
_FIELDS = ("seq", "kind", "payload", "prev", "hash")
_LINE = re.compile(
    r'\{"seq":(0|[1-9][0-9]{0,17}),"kind":"([a-z]+)","payload":(\{.*\}),"prev":"([0-9a-f]{64})","hash":"([0-9a-f]{64})"\}'
)
_SEAL = len(',"hash":"') + 64 + len('"}')
_EVENT, _CONTEXT = '{"event":', ',"context":'
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_decode = json.JSONDecoder().raw_decode

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Record:
    """One line: its number from 0, its kind, its content, the hash of the line before, and its own.

    `event` is what it charges or declares, where a reader has parsed it (`event_of`).
    """

    seq: int
    kind: str
    payload: Mapping[str, object]
    prev: str
    hash: str
    event: Event | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class History:
    """A verified ledger as read: its records, and the bytes of an unfinished last line (usually none)."""

    records: tuple[Record, ...]
    torn: bytes

    @property
    def unit(self) -> str:
        """What one record of the data is, as the header says."""
        return str(self.records[0].payload.get("unit"))

    @property
    def relation(self) -> str:
        """Which datasets are neighbours: the name of the relation that the header states."""
        return relation_named(str(self.records[0].payload.get("relation")))

    @property
    def rule(self) -> Rule | None:
        """The rule of the filter that governs the ledger; None where its schedules were fixed in advance.

        Raises:
            ValueError: it is declared in terms that are unknown here, or after the first charge.
        """
        rule = declared_rule(configurations(self.records), self.relation)
        charges = 0
        for record in self.records if rule is not None else ():
            charges += record.kind == "charge"
            if any("filter" in config for config in configurations((record,))):
                refuse_late(charges)
        return rule

    def events(self) -> Composed:
        """Return everything charged as one event, equal charges merged, under the relation of the header."""
        return charged(self.records)


def following(last: Record | None, kind: str, payload: Mapping[str, object]) -> Record:
    """Make the record that comes after `last` (None: the first).

    Raises:
        ValueError: the payload is no plain finite JSON data.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}; use note for anything else")
    try:
        plain = json.loads(_encode(payload))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"a payload must be finite JSON data; got {error}; pass numbers and strings only"
        ) from error
    seq, prev = (0, _FIRST) if last is None else (last.seq + 1, last.hash)
    fields = {"seq": seq, "kind": kind, "payload": plain, "prev": prev}
    return Record(seq, kind, plain, prev, hashlib.sha256(_encode(fields).encode()).hexdigest())


def to_line(record: Record) -> bytes:
    """Write the record as its line, line feed included."""
    return _encode({name: getattr(record, name) for name in _FIELDS}).encode() + b"\n"


class Chain:
    """Verifies the lines of a ledger as they come; afterwards `torn` holds what follows the last line feed."""

    __slots__ = ("_events", "_last", "_next", "_where", "torn")

    def __init__(self, where: str) -> None:
        self.torn = b""
        self._where = where
        self._next, self._last = 0, _FIRST
        self._events: dict[str, tuple[Mapping[str, object], Event]] = {}

    def records(self, lines: Iterable[bytes]) -> Iterator[Record]:
        """Read lines that end in a line feed, but for the last one perhaps.

        Raises:
            LedgerCorrupt: a line does not verify, or there is not even a header.
        """
        for line in lines:
            if line[-1:] != b"\n":
                self.torn = line
                break
            yield self._record(line[:-1])
        if not self._next:
            raise self._corrupt("no header: the file is empty or was cut off")

    def _record(self, line: bytes) -> Record:
        found = _LINE.fullmatch(line.decode("ascii", "replace"))
        if found is None or found[2] not in KINDS:
            raise self._corrupt("not written by a ledger")
        kind, seq, prev, seal = found[2], int(found[1]), found[4], found[5]
        digest = hashlib.sha256(line[:-_SEAL] + b"}").hexdigest()
        if seq != self._next or prev != self._last or seal != digest:
            raise self._corrupt("its place and hash do not continue the chain")
        if (kind == "header") != (seq == 0):
            raise self._corrupt(f"kind {kind!r} in this place")
        payload, event = self._payload(kind, found[3])
        # The hash before is one string for both records.
        record = Record(seq, kind, payload, self._last, digest, event)
        self._next, self._last = seq + 1, digest
        return record

    def _payload(self, kind: str, data: str) -> tuple[Mapping[str, object], Event | None]:
        cut = data.find(_CONTEXT) if kind == "charge" and data.startswith(_EVENT) else -1
        told = data[len(_EVENT) : cut] if cut > 0 else ""
        if told in self._events:
            context = _canonical(data[cut + len(_CONTEXT) : -1])
            if context is not None:
                plain, event = self._events[told]
                return {"event": plain, "context": context}, event
        payload = _canonical(data)
        if payload is None:
            raise self._corrupt("not written by a ledger")
        plain = payload.get("event")
        event = self._event(kind, plain)
        if event is not None and isinstance(plain, Mapping) and told == _encode(plain):
            self._events[told] = plain, event
        return payload, event

    def _event(self, kind: str, data: object) -> Event | None:
        if kind not in ("charge", "attempt") or not isinstance(data, Mapping):
            if kind == "charge":
                raise self._corrupt("a charge without an event")
            return None
        try:
            return from_dict(data)
        except ValueError as error:
            raise self._corrupt(str(error)) from error

    def _corrupt(self, got: str) -> LedgerCorrupt:
        return LedgerCorrupt(
            f"{self._where} must be an unbroken chain of records; got line {self._next + 1}: {got}; restore the file "
            "from a copy, and treat whatever it covered as spent"
        )


def parse(data: bytes, where: str) -> tuple[tuple[Record, ...], bytes]:
    """Verify the bytes of a ledger: its records, and what follows the last line feed.

    Raises:
        LedgerCorrupt: a line does not verify, or there is not even a header.
    """
    chain = Chain(where)
    return tuple(chain.records(BytesIO(data))), chain.torn


def read(path: str | os.PathLike[str]) -> History:
    """Read and verify a ledger without locking it; a writer may be at work, hence `History.torn`.

    Raises:
        LedgerCorrupt: a line does not verify, and the message gives its number; or `path` is no regular file.
        OSError: it cannot be read.
    """
    chain = Chain(str(path))
    with os.fdopen(open_for_reading(path), "rb") as file:
        return History(tuple(chain.records(file)), chain.torn)


def verify(path: str | os.PathLike[str]) -> str:
    """Verify a ledger and return its head; compare it with one kept elsewhere.

    Raises:
        LedgerCorrupt: a line does not verify, or the last one is unfinished.
    """
    history = read(path)
    if history.torn:
        raise LedgerCorrupt(
            f"{path} must be an unbroken chain of records; got line {len(history.records) + 1}: unfinished: a writer is "
            "at work, or died here; wait for it, or open the ledger, which counts it"
        )
    return history.records[-1].hash


def charged(records: Iterable[Record]) -> Composed:
    """Return everything the records charge as one event, equal charges merged, under the relation of the header.

    An accountant of another relation refuses it.
    """
    counts: Counter[Event] = Counter()
    relation, last, run = None, None, 0
    for record in records:
        if record.kind == "header":
            relation = relation_named(str(record.payload.get("relation")))
        event = event_of(record) if record.kind == "charge" else None
        if event is None:
            continue
        if event is not last and last is not None:
            counts[last] += run
            run = 0
        last, run = event, run + 1
    if last is not None:
        counts[last] += run
    return Composed(tuple(Repeated(event, count) for event, count in counts.items()), relation)


def event_of(record: Record) -> Event | None:
    """Return the event that a charge pays for, or that an attempt declares."""
    if record.event is not None:
        return record.event
    data = record.payload.get("event") if record.kind in ("charge", "attempt") else None
    return from_dict(data) if isinstance(data, Mapping) else None


def configurations(records: Iterable[Record]) -> Iterator[Mapping[str, object]]:
    """The public configurations of the attempts, in order."""
    for record in records:
        if record.kind == "attempt" and isinstance(config := record.payload.get("config"), Mapping):
            yield config


def check_header(header: Record, unit: str, relation: str, where: str) -> None:
    """Refuse to continue a ledger that was made for another format, unit or relation."""
    for name, expected in (("format", FORMAT), ("unit", unit), ("relation", relation)):
        got = header.payload.get(name)
        if got != expected:
            raise ValueError(
                f"{name} of {where} must be {expected!r} to be continued; got {got!r}; use another ledger file, or "
                f"continue this one with {name}={got!r}"
            )


def _canonical(data: str) -> dict[str, object] | None:
    """Parse an object that is written as `json` would write it; None for anything else."""
    try:
        value, end = _decode(data)
        return value if end == len(data) and isinstance(value, dict) and _encode(value) == data else None
    except (ValueError, RecursionError):
        return None
