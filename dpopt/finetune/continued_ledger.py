# SPDX-License-Identifier: Apache-2.0
"""The ledger that a run goes on with: what it holds, and whether it still is the one that the folder's report knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from accountants import Composed, History, read
from dpopt.finetune.record_files import InputError

LEDGER_NAME = "privacy.ledger.jsonl"
REPORT_NAME = "report.json"


def spent_before(ledger: Path, relation: str) -> Composed:
    """What `ledger` holds for a run under `relation` to add to; nothing where there is none.

    Raises:
        InputError: it is of another relation, or a filter governs it.
    """
    if not ledger.exists():
        return Composed((), relation)
    history = read(ledger)
    if history.relation != relation:
        raise InputError(
            f"expected a ledger of the relation {relation}; got {ledger}, whose relation is {history.relation}; pass "
            f"--relation {history.relation}, or another --ledger"
        )
    rule = history.rule
    if rule is not None:
        raise InputError(
            f"expected a ledger without a filter, for a run at a fixed noise; got {ledger}, which a filter of epsilon "
            f"{rule.epsilon:g} at delta {rule.delta:g} governs; pass another --ledger"
        )
    return history.events()


def require_reported(out: Path, ledger: Path) -> None:
    """Refuse a ledger without the head that the report in `out` states: rolled back, replaced, or gone.

    Another ledger that is named on purpose, with --ledger, is none of this report's concern.

    Raises:
        InputError: it lacks the head, or the report cannot be read.
    """
    told = _report(out / REPORT_NAME)
    head = told.get("ledger_head")
    if not isinstance(head, str):
        return
    history = read(ledger) if ledger.exists() else None
    if history is not None and any(record.hash == head for record in history.records):
        return
    known = Path(str(told.get("ledger")))
    if _id(history) != told.get("ledger_id") and ledger.resolve() not in (
        known.resolve(),
        (out / LEDGER_NAME).resolve(),
    ):
        return
    held = "none there" if history is None else f"one of {len(history.records)} records without it"
    raise InputError(
        f"expected the ledger with the head {head}, which {out / REPORT_NAME} states after "
        f"{told.get('ledger_charges')} charges; got {held} at {ledger}: it was rolled back, replaced or removed, and its "
        f"charges would be forgotten; put the newest copy back, name the ledger with --ledger ({known}), or choose "
        "another --out"
    )


def _report(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(
            f"expected the report of a run in {path}, which states the head of its ledger; got something unreadable "
            f"({error}); move it away if the ledger is known to be whole, or choose another --out"
        ) from error
    return told if isinstance(told, dict) else {}


def _id(history: History | None) -> object:
    return None if history is None else history.records[0].payload.get("id")
