# SPDX-License-Identifier: Apache-2.0
"""`dpopt audit step module:name`: check somebody's training step for privacy faults."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpopt.audit.step_checks import StepReport, TrainingStep, check_step
from dpopt.audit.step_checks.checking import CHECKS, STEPS
from dpopt.audit.step_checks.findings import CAUTION, FAULT, HOLDS, UNCHECKED
from dpopt.cli.failures import exit_codes

_COLOURS = {HOLDS: "green", CAUTION: "yellow", FAULT: "bold red", UNCHECKED: "dim"}


def step(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:NAME",
            help="A dpopt.audit.step_checks.TrainingStep, or a function that returns one: my_steps:opacus_step. "
            "Modules are also looked for in the current folder.",
        ),
    ],
    seed: Annotated[int, typer.Option(help="Of the checker's own randomness; the same finds the same.")] = 0,
    steps: Annotated[int, typer.Option(min=20, help="Noisy steps to look at.")] = STEPS,
    only: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(CHECKS)}; may be repeated. (default: all)")
    ] = None,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Also write the findings to this file.")
    ] = None,
) -> None:
    """Look for privacy faults in a training step by running it: ours, another library's, or your own.

    Exit code 0: no fault found; 1: a fault, with the way to see it again; 2: it cannot be run; 3: nothing could be said.
    """
    console, errors = Console(), Console(stderr=True)
    with exit_codes(errors):
        case = load(target)
        report = _checked(case, target, seed, steps, tuple(only or CHECKS))
        if json_out is not None:
            written = {"name": report.name, "findings": [asdict(f) for f in report.findings]}
            json_out.write_text(json.dumps(written, indent=2) + "\n")
        show(console, report)
    raise typer.Exit(report.exit_code)


def _checked(case: TrainingStep, target: str, seed: int, steps: int, checks: tuple[str, ...]) -> StepReport:
    try:
        return check_step(case, name=target, seed=seed, steps=steps, checks=checks)
    except ValueError:
        raise
    except Exception as error:  # whatever a user's step raises; 1 would say that it has a fault
        raise ValueError(
            f"expected a step that runs on its own records; got {type(error).__name__}: {error}; run it once by hand, "
            "model, step = make(records, 0.0); step(records[:4])"
        ) from error


def load(target: str) -> TrainingStep:
    """The training step called `module:name`, made by calling it where it is a function.

    Raises:
        ValueError: there is none.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise ValueError(f"expected MODULE:NAME; got {target!r}; write my_steps:my_step for my_steps.py")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"expected a module that can be imported; got {error}; run in the folder of {module.split('.')[0]}.py"
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    case = found() if callable(found) and not isinstance(found, TrainingStep) else found
    if not isinstance(case, TrainingStep):
        raise ValueError(
            f"expected a TrainingStep called {name!r} in {module}, or a function that returns one; got "
            f"{type(case).__name__}; see docs/check-your-step.md for one in ten lines"
        )
    return case


def show(console: Console, report: StepReport) -> None:
    """A table of the findings, the ways to see faults again, and one sentence."""
    table = Table(title=f"Privacy faults of {escape(report.name)}", title_justify="left")
    table.add_column("check", style="bold", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("expected", overflow="fold")
    table.add_column("seen", overflow="fold")
    table.add_column("confidence", overflow="fold")
    for finding in report.findings:
        colour = _COLOURS[finding.verdict]
        verdict = f"[{colour}]{finding.verdict}[/]"
        table.add_row(
            finding.check, verdict, escape(finding.expected), escape(finding.seen), escape(finding.confidence)
        )
    console.print(table)
    for finding in (*report.faults, *report.cautions):
        if finding.reproduce:
            console.print(
                f"[bold]{finding.check}[/] again: {escape(finding.reproduce)}",
                soft_wrap=True,
                highlight=False,
            )
    console.print(f"[bold]{escape(sentence(report))}[/]", soft_wrap=True, highlight=False)


def sentence(report: StepReport) -> str:
    """The verdict in one sentence."""
    if report.exit_code == 3:
        return "Nothing could be said: the step's release or its noise could not be seen."
    if report.faults:
        names = ", ".join(dict.fromkeys(f.check for f in report.faults))
        return f"The step does not keep its claim: {names}."
    also = f", under {len(report.cautions)} conditions that are named above" if report.cautions else ""
    return f"No fault was found{also}; a search can miss what it did not try."
