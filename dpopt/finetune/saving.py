# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: the model or adapter, the reports, the picture; and what happens when they do not fit.

The law of this file: the ledger is never touched here, and trained weights are given up only when no disk takes
them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from torch import nn

from dpopt.atomic_files import write_file
from dpopt.finetune.language_model import save
from dpopt.finetune.run_plan import Prepared
from dpopt.reports.report import Report, to_html, to_markdown

_ROOM_BESIDE_MODEL = 20_000_000
PICTURE = "curves.png"


class NotSaved(OSError):
    """The run ended, but not all of it could be written where it was asked for; the message says what stands where."""


def check_room(model: nn.Module, out: Path) -> None:
    """Make `out`, and refuse to start where the trained weights would not fit.

    Raises:
        OSError: `out` cannot be made, or its disk has too little room.
    """
    out.mkdir(parents=True, exist_ok=True)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # Frozen weights are not written; a tokenizer and the reports are.
    needed, free = 2 * trained + _ROOM_BESIDE_MODEL, shutil.disk_usage(out).free
    if free < needed:
        raise OSError(
            f"expected {needed / 1e6:.0f} MB free for the model and its report in {out}; got {free / 1e6:.0f} MB; free "
            "the disk or choose another --out (nothing was charged)"
        )


def save_all(prepared: Prepared, report: Report) -> Path:
    """Write model, reports and picture to `out`; a model that does not fit goes to the temporary folder.

    Raises:
        NotSaved: something did not fit.
    """
    out = prepared.plan.out
    folder = out / report.saved_as
    try:
        save(prepared.model, prepared.tokenizer, folder)
    except OSError as error:
        raise _rescued(prepared, report, folder, error) from error
    try:
        write_report(report, out)
    except OSError as error:
        raise NotSaved(
            f"expected room for the report in {out}; got '{_told(error)}'; the model in {folder} and the ledger "
            f"{prepared.plan.ledger} are complete; free the disk (epsilon {report.epsilon:.3f} at delta "
            f"{report.delta:g})"
        ) from error
    return folder


def write_report(report: Report, out: Path) -> None:
    """Write `report.json`, the picture, `report.md` and `report.html` to `out`."""
    from dpopt.reports.plots import curves

    write_file(out / "report.json", report.to_json().encode())
    picture = curves(report)
    write_file(out / PICTURE, picture)
    write_file(out / "report.md", to_markdown(report, picture=PICTURE).encode())
    write_file(out / "report.html", to_html(report, picture).encode())


def _rescued(prepared: Prepared, report: Report, folder: Path, error: OSError) -> NotSaved:
    stands = f"the ledger {prepared.plan.ledger} holds every release"
    try:
        rescue = Path(tempfile.mkdtemp(prefix="dpopt-rescued-")) / folder.name
        save(prepared.model, prepared.tokenizer, rescue)
        write_report(report, rescue.parent)
    except OSError as second:
        return NotSaved(
            f"expected room for the model in {folder}; got '{_told(error)}', and in {tempfile.gettempdir()} "
            f"'{_told(second)}'; what was trained is lost, and {stands}; free a disk, or set TMPDIR to one with "
            "room, before the next run"
        )
    return NotSaved(
        f"expected room for the model in {folder}; got '{_told(error)}'; it was saved in {rescue} instead, with "
        f"its report beside it: move both from there; {stands}"
    )


def _told(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
