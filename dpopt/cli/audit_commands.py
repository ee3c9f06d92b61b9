# SPDX-License-Identifier: Apache-2.0
"""The sub-app `audit`, which asks what a run really leaked.

Commands that other files hold are registered at the end of this file, a line each.
"""

from __future__ import annotations

import typer

from dpopt.cli import step_commands

app = typer.Typer(no_args_is_help=True, help="Ask what a run really leaked, and check steps for faults.")


@app.callback()
def _main() -> None:
    pass


app.command("step")(step_commands.step)
