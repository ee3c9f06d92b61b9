# SPDX-License-Identifier: Apache-2.0
"""How much of a run's epsilon its own canaries show: `python -m benchmarks.audit_power`.

A linear model, 20 records with 20 features, and m features that no record has, a canary at each. Everything else is the
product: sampler, clipper, ledger, noise and optimizer of `PrivateTraining`, calibrated to epsilon at delta 1e-5 by the
accountant; keys are fresh and secret. Runs are kept in a folder, so that a run of this program goes on where one stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from torch import nn

from accountants import Gaussian, accountant
from benchmarks.report import command_line, default_path, described, surroundings, write
from dpopt import FlatClipper, GaussianMechanism, PoissonSampling, PrivateTraining, noise_multiplier
from dpopt.audit import (
    Canaries,
    Evidence,
    fdp_one_run,
    full_signal,
    gdp_scores,
    joined,
    order_statistics,
    per_step,
    steinke,
)

DELTA, RECORDS, FEATURES = 1e-5, 20, 20
SETTINGS = ((0.5, 100), (1.0, 100), (0.1, 200))
"""Sampling rate and steps."""
BOUNDS = {
    "full signal": (full_signal, "sum"),
    "spread as seen": (gdp_scores, "sum"),
    "order": (order_statistics, "sum"),
    "order of likelihoods": (order_statistics, "likelihood"),
    "single steps": (per_step, "steps"),
    "trade-off, one run": (fdp_one_run, "sum"),
    "guesses, one run": (steinke, "sum"),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """Runs of one configuration."""

    epsilon: float
    num: int
    rate: float
    steps: int

    @property
    def name(self) -> str:
        """For files."""
        return f"epsilon{self.epsilon:g}-m{self.num}-q{self.rate:g}-t{self.steps}"


def cells(epsilons: Sequence[float], nums: Sequence[int]) -> list[Cell]:
    """All of them; other sampling rates at epsilon 4 only."""
    found = []
    for rate, steps in SETTINGS:
        found += [Cell(e, m, rate, steps) for e in epsilons for m in nums if rate == 0.5 or e == 4]
    return found


def run(cell: Cell, noise: float) -> tuple[Evidence, ...]:
    """One training run with canaries, and what it leaked of them."""
    model = nn.Linear(FEATURES + cell.num, 1)
    data = list(torch.cat((torch.randn(RECORDS, FEATURES), torch.zeros(RECORDS, cell.num)), 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    audit = Canaries(cell.num, where={"weight": range(FEATURES, FEATURES + cell.num)}, untouched=True)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        private = PrivateTraining(
            model, clipper=FlatClipper(1.0), mechanism=GaussianMechanism(noise),
            sampling=PoissonSampling(cell.rate, cell.rate * RECORDS), ledger=Path(folder) / "run.jsonl", audit=audit,
        )  # fmt: skip
        with private:
            for batch in private.batches(data, steps=cell.steps):
                if batch.examples:
                    rows = torch.stack(batch.examples)  # pyright: ignore[reportArgumentType]
                    private.accumulate((model(rows).squeeze(1) - 1).square())
                private.release()
                optimizer.step()
            claimed = private.epsilon(DELTA)
    assert claimed <= cell.epsilon * 1.001, claimed
    return private.evidence


def measured(cell: Cell, noise: float) -> dict[str, object]:
    """A run's bounds, its cost, and the scores of the whole run."""
    started = time.process_time()
    evidence = run(cell, noise)
    seconds = time.process_time() - started
    by_kind = {"sum": evidence[0], "likelihood": evidence[min(1, len(evidence) - 2)], "steps": evidence[-1]}
    bounds = {name: bound(by_kind[kind], DELTA).epsilon for name, (bound, kind) in BOUNDS.items()}
    return {"bounds": bounds, "seconds": seconds, "evidence": evidence[0].to_json()}


def collected(cell: Cell, runs: int, kept: Path, *, only_kept: bool) -> list[dict[str, object]]:
    """The runs of a cell: those that are kept, and new ones up to their number."""
    folder = kept / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    noise = noise_multiplier(epsilon=cell.epsilon, delta=DELTA, sampling_rate=cell.rate, steps=cell.steps)
    found = []
    for number in range(runs):
        path = folder / f"{number}.json"
        if not path.exists():
            if only_kept:
                continue
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(measured(cell, noise)))
            partial.replace(path)
        found.append(json.loads(path.read_text()) | {"noise": noise})
    return found


def true_mu(epsilon: float) -> float:
    """The mu of the Gaussian release of this epsilon."""
    rule = accountant("pld")
    low, high = 1e-3, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        above = rule.curve(Gaussian(1 / middle)).epsilon(DELTA) > epsilon
        low, high = (low, middle) if above else (middle, high)
    return low


def summary(cell: Cell, found: list[dict[str, object]]) -> dict[str, object]:
    """Medians and spreads of a cell, and the audit of all its runs together."""
    told: dict[str, object] = {"cell": cell.name, "runs": len(found), "noise_multiplier": found[0]["noise"]}
    for name in BOUNDS:
        values = sorted(one["bounds"][name] for one in found)  # pyright: ignore[reportIndexIssue]
        told[name] = {"median": statistics.median(values), "least": values[0], "most": values[-1],
                      "above the claim": sum(v > cell.epsilon for v in values)}  # fmt: skip
    together = joined(tuple(Evidence.from_json(str(one["evidence"])) for one in found))
    scores, included = together.scores, together.included
    estimate = float(scores[included].mean() - scores[~included].mean()) / float(scores[~included].std())
    lower = gdp_scores(together, DELTA)
    told["all runs"] = {
        "mu": true_mu(cell.epsilon), "estimated mu": estimate, "lower epsilon": lower.epsilon,
        "lower mu": 0.0 if lower.epsilon <= 0 else true_mu(lower.epsilon), "scores": len(scores),
    }  # fmt: skip
    told["seconds"] = statistics.median(one["seconds"] for one in found)  # pyright: ignore[reportArgumentType]
    return told


def shown(value: dict[str, float]) -> str:
    """median [least, most]."""
    return f"{value['median']:.2f} [{value['least']:.2f}, {value['most']:.2f}]"


def table(rows: list[tuple[Cell, dict[str, object]]]) -> list[str]:
    """The report's tables."""
    lines = ["| epsilon | m | rate, steps | runs | " + " | ".join(BOUNDS) + " | seconds |",
             "|" + "---|" * (5 + len(BOUNDS))]  # fmt: skip
    for cell, told in rows:
        bounds = " | ".join(shown(told[name]) for name in BOUNDS)  # pyright: ignore[reportArgumentType]
        lines.append(f"| {cell.epsilon:g} | {cell.num} | {cell.rate:g}, {cell.steps} | {told['runs']} | {bounds} | "
                     f"{told['seconds']:.2f} |")  # fmt: skip
    lines += [
        "",
        "| epsilon | m | rate | true mu | lower bound on mu, all runs | of it | estimate |",
        "|" + "---|" * 7,
    ]
    for cell, told in rows:
        whole: dict[str, float] = told["all runs"]  # pyright: ignore[reportAssignmentType]
        share = whole["lower mu"] / whole["mu"]
        lines.append(f"| {cell.epsilon:g} | {cell.num} | {cell.rate:g} | {whole['mu']:.3f} | {whole['lower mu']:.3f} | "
                     f"{share:.1%} | {whole['estimated mu']:.3f} |")  # fmt: skip
    return lines


def main() -> None:
    """Read the command line, run what is missing, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_power", description=__doc__)
    parser.add_argument("--runs", type=int, default=25, help="of each cell")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 4.0, 8.0])
    parser.add_argument("--canaries", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir()) / "dpopt-audit-power")
    parser.add_argument("--only-kept", action="store_true", help="report what is there, and run nothing")
    parser.add_argument("--out", type=Path, help="default: benchmarks/audit-power_<processor>_<date>.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for cell in cells(settings.epsilons, settings.canaries):
        found = collected(cell, settings.runs, settings.kept, only_kept=settings.only_kept)
        if found:
            rows.append((cell, summary(cell, found)))
            print(cell.name, {name: shown(rows[-1][1][name]) for name in BOUNDS}, flush=True)
    report(rows, settings.out or default_path("audit-power"))


def report(rows: list[tuple[Cell, dict[str, object]]], out: Path) -> None:
    """Write it as markdown and JSON."""
    around = surroundings()
    above = sum(told[name]["above the claim"] for _, told in rows for name in BOUNDS)  # pyright: ignore
    whole = sum(int(told["runs"]) for _, told in rows) * len(BOUNDS)  # pyright: ignore[reportArgumentType]
    command = command_line("benchmarks.audit_power", sys.argv[1:])
    lines = [
        "# What an audit by canaries shows", "",
        f"Lower bounds on epsilon at delta 1e-5 and 95 % confidence, of runs calibrated to the epsilon in the first column; "
        f"median [least, most]. `{command}`", "", *table(rows), "",
        f"{above} of {whole} bounds lie above the claim ({above / max(1, whole):.1%}; at most 5 % may in the long run).",
        "", "*Seconds* are process time of one run with its canaries.", "", described(around), "",
    ]  # fmt: skip
    told = [told for _, told in rows]
    write(out, "\n".join(lines), {"rows": told, "surroundings": around, "command": command})


if __name__ == "__main__":
    main()
