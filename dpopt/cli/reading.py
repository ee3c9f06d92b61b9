# SPDX-License-Identifier: Apache-2.0
"""Ledgers as the commands read them: whole, in order, and with a word about what takes long."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from accountants import Event, History, read
from accountants.records import event_of

PATIENCE = 2.0
"""Seconds after which a command says what it is doing."""


@contextmanager
def patience(console: Console, what: str) -> Iterator[None]:
    """Say on `console` what the block does once it takes long: a moving line on a terminal, else a plain one."""
    shown: list[Status] = []

    def show() -> None:
        if console.is_terminal:
            shown.append(console.status(f"{escape(what)} ..."))
            shown[0].start()
        else:
            console.print(f"dpopt: {escape(what)} ...", highlight=False, soft_wrap=True)

    timer = threading.Timer(PATIENCE, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        for status in shown:
            status.stop()


def ledger_at(path: Path, errors: Console) -> History:
    """Read and verify the ledger at `path`.

    Raises:
        LedgerCorrupt: it does not verify, or is no file.
        OSError: it cannot be read; the message says what was expected.
    """
    collecting = gc.isenabled()
    gc.disable()  # every record stays, so that looking for garbage among them would take a third of the time
    try:
        with patience(errors, f"verifying {path}"):
            return read(path)
    except OSError as error:
        got = error.strerror or type(error).__name__
        raise OSError(
            f"expected a ledger that can be read; got {path}: {got}; name the file that the run printed"
        ) from error
    finally:
        if collecting:
            gc.enable()


def runs(history: History) -> tuple[tuple[Event, int], ...]:
    """The charges of a ledger in their order, runs of equal ones merged."""
    found: list[tuple[Event, int]] = []
    last, count = None, 0
    for record in history.records:
        event = event_of(record) if record.kind == "charge" else None
        if event is None:
            continue
        if event is not last and event != last:
            if last is not None:
                found.append((last, count))
            last, count = event, 0
        count += 1
    return (*found, (last, count)) if last is not None else ()
