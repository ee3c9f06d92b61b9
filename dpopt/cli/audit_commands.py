# SPDX-License-Identifier: Apache-2.0
"""The sub-app `audit`, which asks what a run really leaked.

`dpopt audit RUN` is short for `dpopt audit run RUN`. Commands that other files hold are registered at the end of this
file, a line each.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperGroup

from dpopt.cli import attack_commands, step_commands
from dpopt.cli.failures import exit_codes
from dpopt.cli.reading import patience
from dpopt.reports.report import rounded_up

if TYPE_CHECKING:
    from dpopt.audit.reports.audit_report import AuditReport

_COLORS = {0: "green", 1: "bold red"}


class _RunUnlessNamed(TyperGroup):
    """What is no command is a run: `dpopt audit runs/finetune-0001`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_RunUnlessNamed,
    no_args_is_help=True,
    help="Ask what a run really leaked, and check steps for faults.",
)


@app.callback()
def _main() -> None:
    pass


@app.command()
def run(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="The folder of a run with canaries, or its ledger. Several are audited together.",
            show_default=False,
        ),
    ],
    confidence: Annotated[float, typer.Option(help="With which all lower bounds hold together.")] = 0.95,
    delta: Annotated[
        float | None, typer.Option(help="The delta of the claim. (default: that of the run's report)")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder for audit.html and audit.json. (default: that of the first run)"),
    ] = None,
) -> None:
    """Hold what runs claim against what they leaked of their canaries; write audit.html and audit.json.

    Exit status 1 if a lower bound exceeds the claim, 3 if the audit had no power to say anything, else 0. The word `run`
    may be left out.
    """
    errors = Console(stderr=True)
    with exit_codes(errors):
        from dpopt.atomic_files import write_file
        from dpopt.audit.reports.audit_plots import bounds_picture, scores_picture
        from dpopt.audit.reports.audit_report import to_html
        from dpopt.audit.reports.audit_run import audit_runs

        with patience(errors, "auditing"):
            report = audit_runs(runs, delta=delta, confidence=confidence)
            pictures = [scores_picture(one) for one in report.evidence]
            whole = to_html(report, bounds_picture(report.claim, report.bounds), pictures)
        folder = out or (runs[0] if runs[0].is_dir() else runs[0].parent)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "audit.json", report.to_json().encode())
        write_file(folder / "audit.html", whole.encode())
        _tell_runs(report, runs, folder)
        _show(Console(), report, folder)
    if report.verdict.exit_code:
        raise typer.Exit(report.verdict.exit_code)


def _tell_runs(report: AuditReport, runs: list[Path], folder: Path) -> None:
    """Put the verdict into the report of each run that has one."""
    from dpopt.atomic_files import write_file
    from dpopt.audit.reports.audit_report import to_section
    from dpopt.reports.report import with_section

    for run in runs:
        own = run / "report.html"
        if own.is_file():
            link = os.path.relpath(folder / "audit.html", run)
            whole = with_section(own.read_text(encoding="utf-8"), "audit", to_section(report, link))
            write_file(own, whole.encode())


def _show(console: Console, report: AuditReport, folder: Path) -> None:
    from dpopt.audit.reports.audit_report import could_show
    from dpopt.audit.reports.verdict import rounded_down

    title = f"Audit: the claim is epsilon {rounded_up(report.claim.epsilon)} at delta {report.claim.delta:g}, at most"
    table = Table(
        "lower bound", "epsilon", "confidence", "could show", Column("seen", overflow="fold"), title=title
    )
    for bound in report.bounds:
        over = bound.epsilon > report.claim.epsilon
        table.add_row(
            escape(bound.title), rounded_down(bound.epsilon), f"{100 * bound.confidence:.4g} %", could_show(bound),
            escape(bound.observed), style="red" if over else None,
        )  # fmt: skip
    console.print(table)
    for control in report.controls:
        passed = "[green]as it must[/]" if control.passed else "[bold red]NOT as it must[/]"
        console.print(
            f"control, {escape(f'{control.kind}: {control.name}')}: {passed}; {escape(control.observed)}",
            highlight=False,
            soft_wrap=True,
        )
    color = _COLORS.get(report.verdict.exit_code, "yellow")
    console.print(f"[{color}]{escape(report.verdict.sentence)}[/]", highlight=False, soft_wrap=True)
    console.print(
        f"Written: {escape(str(folder / 'audit.html'))}, audit.json", highlight=False, soft_wrap=True
    )


attack_commands.register(app)
app.command("step")(step_commands.step)
