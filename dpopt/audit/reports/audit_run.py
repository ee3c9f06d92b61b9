# SPDX-License-Identifier: Apache-2.0
"""From the folders of runs to the report of their audit: what they claim, what they leaked, and the verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from accountants import Bound, History, UnpricedEvent, accountant, ledger_bound, read
from accountants.ledger.summary import summary
from dpopt.audit.bounds.battery import lower_bounds, of_many_runs
from dpopt.audit.bounds.families import GAUSSIAN, Family, gaussian_covers
from dpopt.audit.bounds.lower_bound import LowerBound
from dpopt.audit.canaries.coins import about, files, read_evidence
from dpopt.audit.evidence import Evidence
from dpopt.audit.reports import controls
from dpopt.audit.reports.audit_report import AuditReport
from dpopt.audit.reports.verdict import Claim, verdict
from dpopt.budget.ledger_files import insecurity

_REPORT = "report.json"


def audit_runs(paths: Sequence[Path], *, delta: float | None = None, confidence: float = 0.95) -> AuditReport:
    """Audit one run, or several of one configuration together, from what they left in their folders.

    Args:
        paths: for each run its folder, or its ledger.
        delta: of the claim; None: the one in the run's report.
        confidence: with which all lower bounds hold together.

    Raises:
        ValueError: a run was not audited or has not ended, its files are not of each other, or no delta is known.
        LedgerCorrupt: a ledger does not verify.
    """
    ledgers = [ledger_of(path) for path in paths]
    runs = [_evidence(ledger) for ledger in ledgers]
    _require_different(ledgers, runs)
    delta = _delta(ledgers[0]) if delta is None else delta
    histories = [read(ledger) for ledger in ledgers]
    claims = [ledger_bound(history, delta) for history in histories]
    claim = max(claims, key=lambda bound: bound.epsilon)
    family = _family(histories, claim, sum(one.num_records for run in runs for one in run))
    if len(runs) == 1:
        pooled, told = runs[0], lower_bounds(runs[0], delta, confidence, family=family)
    else:
        pooled, told = of_many_runs(runs, delta, confidence, family=family)

    def again(evidence: Sequence[Evidence]) -> tuple[LowerBound, ...]:
        return lower_bounds(evidence, delta, confidence, family=family)

    tried = (
        controls.positive(pooled, again, claim.epsilon),
        controls.negative(pooled, again, confidence),
        *((controls.power(pooled, again, claim.epsilon, delta),) if 0 < claim.epsilon < math.inf else ()),
        *(found for one in pooled if (found := controls.noise(one)) is not None),
    )
    attempts = [attempt.config for history in histories for attempt in summary(history).attempts]
    claimed = Claim(claim.epsilon, claim.delta, claim.method, (*claim.assumptions, *insecurity(attempts)))
    return AuditReport(
        runs=tuple(path.name for path in paths),
        claim=claimed,
        verdict=verdict(claimed, told, tried, confidence),
        confidence=confidence,
        bounds=told,
        controls=tried,
        evidence=tuple(pooled),
        about=_about(ledgers),
    )


def ledger_of(path: Path) -> Path:
    """The ledger of a run: the path itself, or the one audited ledger in this folder.

    Raises:
        ValueError: there is none that was audited, or several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"expected the folder of a run, or its ledger; got {path}, which is neither; check the path"
        )
    there = sorted(path.glob("*.jsonl"))
    found = [ledger for ledger in there if files(ledger)[0].is_file()]
    if len(found) == 1:
        return found[0]
    got = "none" if not found else ", ".join(ledger.name for ledger in found)
    remedy = "train with dpopt finetune --audit canaries=1000" if not found else "name one of them"
    raise ValueError(f"expected one audited run in {path} (coins beside its ledger); got {got}; {remedy}")


def _evidence(ledger: Path) -> tuple[Evidence, ...]:
    try:
        return read_evidence(ledger)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error


def _require_different(ledgers: Sequence[Path], runs: Sequence[tuple[Evidence, ...]]) -> None:
    seen = {tuple(one.scores.tobytes() for one in run) for run in runs}
    if len(seen) < len(runs):
        raise ValueError(
            f"runs that are audited together must be different runs; got {', '.join(map(str, ledgers))}, of which two have the "
            "same scores; name each run once"
        )


def _delta(ledger: Path) -> float:
    path = ledger.with_name(_REPORT)
    try:
        return float(json.loads(path.read_bytes())["delta"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"expected the delta of the claim, from {_REPORT} beside {ledger} or as an option; got neither; pass "
            "--delta 1e-5"
        ) from None


def _family(histories: Sequence[History], claim: Bound, num_records: int) -> Family | None:
    """Gaussian noise, where the price of each ledger shows that the run leaks no more than it; else None."""
    for history in histories:
        if history.rule is not None or not 0 < claim.epsilon < math.inf:
            return None
        try:
            curve = accountant("pld", history.relation).curve(history.events())
        except (UnpricedEvent, ValueError):
            return None
        if not gaussian_covers(curve, claim.epsilon, claim.delta, num_records):
            return None
    return replace(GAUSSIAN, assumption=f"{GAUSSIAN.assumption}, as the price of its ledger shows")


def _about(ledgers: Sequence[Path]) -> Mapping[str, object]:
    if len(ledgers) == 1:
        return about(ledgers[0])
    return {ledger.parent.name or ledger.name: about(ledger) for ledger in ledgers}
