# SPDX-License-Identifier: Apache-2.0
"""Runs a number of seeded faults in a server of their own, and adds up the verdicts."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.faults.observer import Verdict

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


@dataclass
class Row:
    """The verdicts on one kind of fault, added up; `struck` are the runs in which the fault came about."""

    runs: int = 0
    struck: int = 0
    releases: int = 0
    charges: int = 0
    under: int = 0
    over: int = 0
    repeats: int = 0
    halves: int = 0
    wrong: int = 0

    def add(self, verdict: Verdict) -> None:
        self.runs += 1
        self.struck += verdict.struck
        self.releases += verdict.releases
        self.charges += verdict.charges
        self.under += verdict.under
        self.over += verdict.over
        self.repeats += verdict.repeats
        self.halves += verdict.halves
        self.wrong += bool(verdict.wrong)


def command(folder: Path, first: int, count: int, seed: int) -> list[str]:
    return [sys.executable, str(HERE / "server.py"), str(folder), str(first), str(count), str(seed)]


def environment() -> Mapping[str, str]:
    own = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own, "PYTHONPATH": str(ROOT)}


def verdicts(folder: Path, first: int, count: int, seed: int, *, timeout: float = 600) -> list[Verdict]:
    """Bring about the faults `first` to `first + count` of a seed."""
    done = subprocess.run(
        command(folder, first, count, seed),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"expected the server of faults to end well; got {done.stderr or done.stdout}")
    return [Verdict(**json.loads(line)) for line in done.stdout.splitlines()]


def added(verdicts: Iterable[Verdict]) -> dict[str, Row]:
    """One row for each kind, in order of their names, and the total."""
    rows: dict[str, Row] = {}
    total = Row()
    for verdict in verdicts:
        rows.setdefault(verdict.kind, Row()).add(verdict)
        total.add(verdict)
    return {kind: rows[kind] for kind in sorted(rows)} | {"all": total}
