# SPDX-License-Identifier: Apache-2.0
"""The commands that look at a ledger and never touch it: no lock is taken, so a run may be at work on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from accountants import History, LedgerCorrupt, ledger_bound
from accountants.filter_rule import Rule
from accountants.formats.to_dp_accounting import dp_accounting_data
from accountants.ledger.summary import Attempt, Summary, place_of, summary
from accountants.records import configurations
from dpopt.budget.ledger_files import insecurity
from dpopt.cli.failures import exit_codes
from dpopt.cli.reading import ledger_at, patience
from dpopt.reports.report import rounded_up

UNVERIFIED = 1

app = typer.Typer(
    no_args_is_help=True, help="Look at a ledger without touching it; a run may be writing to it."
)

_FILE = typer.Argument(help="The ledger.", show_default=False)
_HEAD = typer.Option(help="A head noted earlier, e.g. in a report: the ledger must still contain it.")
_DELTA = typer.Option(help="Price all charges at this delta, by the tightest accountant.")


class Format(StrEnum):
    """What `export` writes."""

    JSON = "json"
    DP_ACCOUNTING = "dp-accounting"


@app.command()
def verify(file: Annotated[Path, _FILE], head: Annotated[str | None, _HEAD] = None) -> None:
    """Check the hash chain, and that a head is part of it. Exit status 0 if all holds, else 1."""
    errors = Console(stderr=True)
    with exit_codes(errors):
        try:
            history = ledger_at(file, errors)
        except LedgerCorrupt as error:
            errors.print(f"[bold red]dpopt:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(UNVERIFIED) from None
        for line in _verified(file, summary(history)):
            typer.echo(line)
        if head is not None and not _told(history, head):
            errors.print(
                f"[bold red]dpopt:[/] {escape(str(file))} must contain the head {escape(head)}; got a ledger that "
                "never had it: it was rolled back, or it is another copy; find the one that has it",
                soft_wrap=True,
            )
            raise typer.Exit(UNVERIFIED)


@app.command()
def status(file: Annotated[Path, _FILE], delta: Annotated[float | None, _DELTA] = None) -> None:
    """Print what a ledger covers, its runs, and the epsilon of everything on it."""
    errors = Console(stderr=True)
    with exit_codes(errors):
        history = ledger_at(file, errors)
        seen = summary(history)
        assumptions = insecurity([attempt.config for attempt in seen.attempts])
        rows = _facts(seen)
        if history.rule is not None:
            rows.append(("filter", _filter(history.rule, seen)))
        if delta is not None:
            with patience(errors, f"pricing {len(seen.event.events)} different mechanisms"):
                bound = ledger_bound(history, delta)
            rows.append(("epsilon", f"{rounded_up(bound.epsilon, 4)} at delta {delta:g} ({bound.method})"))
            assumptions = (*bound.assumptions, *assumptions)
        console = Console()
        table = Table("", Column(overflow="fold"), title=escape(str(file)), show_header=False)
        for name, value in rows:
            table.add_row(name, escape(value))
        console.print(table)
        if seen.attempts:
            console.print(_runs(seen))
        for text in assumptions:
            console.print(f"- {escape(text)}", highlight=False, soft_wrap=True)


@app.command()
def export(
    file: Annotated[Path, _FILE],
    format: Annotated[
        Format, typer.Option(help="Every record; or the charges as dp_accounting's events.")
    ] = Format.JSON,
) -> None:
    """Write a verified ledger to standard output, as JSON."""
    errors = Console(stderr=True)
    with exit_codes(errors):
        history = ledger_at(file, errors)
        seen = summary(history)
        data: dict[str, object] = {"unit": seen.unit, "relation": seen.relation, "head": seen.head}
        declared = [config["filter"] for config in configurations(history.records) if "filter" in config]
        if declared:
            data["filter"] = declared[0]
        if format is Format.JSON:
            data |= {"id": seen.id, "torn_bytes": seen.torn, "num_charges": seen.num_charges}
        with patience(errors, f"writing {seen.num_records} records"):
            if format is Format.JSON:
                told = _with_records(data, history)
            else:
                told = json.dumps(data | {"event": _foreign(seen)}, indent=2, allow_nan=False)
        typer.echo(told)


def _with_records(data: dict[str, object], history: History) -> str:
    """The JSON of `data` and of the records, one a line."""
    lines = (
        json.dumps({"seq": r.seq, "kind": r.kind, "payload": r.payload, "hash": r.hash}, allow_nan=False)
        for r in history.records
    )
    head = json.dumps(data, indent=2, allow_nan=False).removesuffix("\n}")
    return f'{head},\n  "records": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}"


def _foreign(seen: Summary) -> dict[str, object]:
    try:
        return dp_accounting_data(seen.event)
    except ModuleNotFoundError as error:
        raise ValueError(
            "the package dp-accounting must be installed to write its events; got none; pip install dp-accounting"
        ) from error


def _verified(file: Path, seen: Summary) -> list[str]:
    lines = [
        f"{file}: an unbroken chain of {seen.num_records} records, {seen.num_charges} charges; head {seen.head}"
    ]
    if seen.repaired:
        where = ", ".join(map(str, seen.repaired))
        lines.append(f"counted for unfinished lines: {len(seen.repaired)} charges (records {where})")
    if seen.repaired_notes:
        lines.append(f"unfinished lines that cost nothing: {len(seen.repaired_notes)}")
    if seen.torn:
        lines.append(_torn(seen))
    return lines


def _told(history: History, head: str) -> bool:
    place = place_of(history, head)
    if place is None:
        return False
    later = history.records[place + 1 :]
    charges = sum(record.kind == "charge" for record in later)
    typer.echo(f"head known: record {place}, {len(later)} records ago; {charges} charges were made since")
    return True


def _torn(seen: Summary) -> str:
    return (
        f"the last line is unfinished ({seen.torn} bytes): a run is writing it, or died there; nothing was released "
        "for it, and the next run counts it all the same"
    )


def _facts(seen: Summary) -> list[tuple[str, str]]:
    forks = "no run says which state of training it continues" if seen.forks is None else str(seen.forks)
    rows = [
        ("unit of privacy", seen.unit),
        ("neighbouring data sets", seen.relation),
        ("charges", f"{seen.num_charges}, of which {len(seen.repaired)} count unfinished lines"),
        ("runs", f"{len(seen.attempts)}, of which {seen.resumes} resumed"),
        ("forks", forks),
        ("head", seen.head),
        ("id", seen.id),
    ]
    return [*rows, ("unfinished", _torn(seen))] if seen.torn else rows


def _filter(rule: Rule, seen: Summary) -> str:
    """What the filter that governs a ledger guarantees, and how much of its budget is left."""
    told = f"epsilon {rule.epsilon:g} at delta {rule.delta:g}, {rule.method}"
    if not rule.kept(seen.event):
        return f"{told}: OVERRUN, it guarantees nothing"
    return f"{told}; {100 * rule.left(rule.cost(seen.event)):.3g} % left"


def _runs(seen: Summary) -> Table:
    table = Table("run", "record", "charges", "estimator", "sampler", "budget", "seed", title="Runs")
    before = () if seen.outside is None else (("-", seen.outside),)
    for number, run in (*before, *((str(i), run) for i, run in enumerate(seen.attempts, start=1))):
        table.add_row(number, str(run.seq), str(run.num_charges), *_configuration(run))
    return table


def _configuration(run: Attempt) -> tuple[str, ...]:
    config = run.config
    told = config.get("estimator")
    estimator = told.get("name", "-") if isinstance(told, Mapping) else "-"
    cells = [escape(str(x)) for x in (estimator, config.get("sampler", "-"), config.get("budget", "-"))]
    seed = config.get("insecure_seed")
    return (*cells, "secret" if seed is None else f"PUBLIC: {escape(str(seed))}")
