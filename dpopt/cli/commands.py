# SPDX-License-Identifier: Apache-2.0
"""The commands and their options."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from dpopt.cli import accounting, audit_commands
from dpopt.cli import ledger as ledgers
from dpopt.cli.finetune_command import finetune

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its tracebacks show local variables, which may hold records
    rich_markup_mode="rich",
    help="Differentially private training: fine-tune a language model, and price what it costs.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dpopt {metadata.version('dpopt')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command()(finetune)
app.command()(accounting.epsilon)
app.command()(accounting.noise_multiplier)
app.command("calibrate")(accounting.calibration)
app.add_typer(ledgers.app, name="ledger")
app.add_typer(audit_commands.app, name="audit")
