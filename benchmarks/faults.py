# SPDX-License-Identifier: Apache-2.0
"""A thousand seeded faults in real training runs: what each kind cost, and what the ledger costs for each step.

python -m benchmarks.faults                             # 1,000 faults, a table, and how long charges take
python -m benchmarks.faults --write benchmarks/results/faults_amd-epyc_2026-11-21    # .md and .json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from accountants import Gaussian, Ledger, PoissonSampled

HARNESS = Path(__file__).resolve().parent.parent / "tests" / "support" / "faults"
SLICE = 250
"""Faults for each server, so that no process lives long."""

STEP = PoissonSampled(0.01, Gaussian(1.0))


@dataclass(frozen=True)
class LedgerCost:
    """Median milliseconds of one charge: wall and user time, and the part of the wall that is the disk's."""

    charges: int
    wall: float
    user: float
    synchronising: float


def ledger_cost(folder: Path, charges: int) -> LedgerCost:
    """Charge `charges` times on a new ledger in `folder`."""
    real, waits, walls = os.fdatasync, [], []

    def timed(fd: int) -> None:
        start = time.perf_counter()
        real(fd)
        waits.append(time.perf_counter() - start)

    os.fdatasync = timed
    try:
        with Ledger.open(folder / "cost.jsonl") as ledger:
            waits.clear()
            user = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            for step in range(charges):
                start = time.perf_counter()
                ledger.charge(STEP, context={"step": step})
                walls.append(time.perf_counter() - start)
            user = resource.getrusage(resource.RUSAGE_SELF).ru_utime - user
    finally:
        os.fdatasync = real
    middle = statistics.median
    return LedgerCost(charges, middle(walls) * 1e3, user / charges * 1e3, middle(waits) * 1e3)


def table(rows: Mapping[str, Mapping[str, int]]) -> str:
    """One line for each kind of fault."""
    names = ["runs", "struck", "releases", "charges", "under", "over", "repeats", "halves", "wrong"]
    lines = [f"| fault | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    lines += [f"| {kind} | {' | '.join(str(row[name]) for name in names)} |" for kind, row in rows.items()]
    return "\n".join(lines)


def report(rows: Mapping[str, Mapping[str, int]], cost: LedgerCost, told: str) -> str:
    """The page."""
    return f"""# Faults in training runs

{told}

{table(rows)}

- *struck*: runs in which the fault came about; signals at random times count always, though some come after the run's
  end. *clean*: the run without a fault that ends each ledger.
- *releases*: draws of noise begun, told by the processes themselves at the first coordinate. *charges*: on the ledger.
- *under*: releases that no charge stands for. *over*: charges that no release stands for; at most one for each fault.
- *repeats*: noise tensors or batches that came twice on a ledger, over all its processes.
- *halves*: steps left with a part of their gradients. *wrong*: runs with anything else amiss: a broken chain, a falling
  epsilon, a second writer, an unexpected error, a gradient that is not finite.

## What the ledger costs for each step

Medians of {cost.charges} charges: {cost.wall:.3f} ms wall, of which {cost.synchronising:.3f} ms
({cost.synchronising / cost.wall:.0%}) wait for the disk; {cost.user:.3f} ms user time (mean).
"""


def verdict_rows(lines: Iterable[str]) -> dict[str, dict[str, int]]:
    """The rows of the verdicts that servers printed."""
    sys.path.insert(0, str(HARNESS))
    from tests.support.faults.harness import added
    from tests.support.faults.observer import Verdict

    return {kind: asdict(row) for kind, row in added(Verdict(**json.loads(line)) for line in lines).items()}


def run(count: int, seed: int) -> list[str]:
    """Bring the faults about, one server after the other; the verdicts as lines."""
    sys.path.insert(0, str(HARNESS))
    from tests.support.faults.harness import verdicts

    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, count, SLICE):
            found = verdicts(Path(folder), first, min(SLICE, count - first), seed)
            lines += [json.dumps(asdict(verdict)) for verdict in found]
            print(f"{first + min(SLICE, count - first)} faults", file=sys.stderr)
    return lines


def main(words: list[str] | None = None) -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument(
        "--verdicts", type=Path, nargs="*", help="what tests/support/faults/server.py printed earlier"
    )
    parser.add_argument("--charges", type=int, default=500)
    parser.add_argument("--write", type=Path, help="the name of the .md and .json, without its ending")
    options = parser.parse_args(words)
    if options.verdicts:
        lines = [line for path in options.verdicts for line in path.read_text().splitlines()]
    else:
        lines = run(options.count, options.seed)
    rows = verdict_rows(lines)
    with tempfile.TemporaryDirectory() as folder:
        cost = ledger_cost(Path(folder), options.charges)
    told = (
        f"Seed {options.seed}, a two-layer model in real runs on real files; `python -m benchmarks.faults`."
    )
    page = report(rows, cost, told)
    print(page)
    if options.write is not None:
        options.write.with_name(f"{options.write.name}.md").write_text(page)
        data = {"seed": options.seed, "rows": rows, "ledger_ms": asdict(cost)}
        options.write.with_name(f"{options.write.name}.json").write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
