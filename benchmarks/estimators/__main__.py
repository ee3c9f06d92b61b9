# SPDX-License-Identifier: Apache-2.0
"""Utility at one budget and step time of every estimator: `python -m benchmarks.estimators --task heavy_tails`.

Each finished run is a line in the file beside the report: the same command goes on where it was interrupted, and
a command over more tasks uses what is there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.estimators.chart import draw
from benchmarks.estimators.report import Outcome, section
from benchmarks.estimators.runs import ACCOUNTANT, DELTA, append, entries, noise_for, run_all
from benchmarks.estimators.stepping import FLOOR, ratios
from benchmarks.estimators.tasks import PLANS, Places, Plan
from benchmarks.estimators.tuning import SEED, chosen, final_jobs, grid_jobs
from benchmarks.report import command_line, default_path, described, surroundings, write

ESTIMATORS = (
    "flat", "automatic", "psac", "quantile", "slack", "median", "huber", "geometric_median", "two_threshold",
    "diff2", "dice", "schedule:steps={steps},noise_end=0.7",
)  # fmt: skip


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimators", description=__doc__)
    parser.add_argument("--task", nargs="+", choices=list(PLANS), required=True)
    parser.add_argument("--data", default="", help="folder of the data sets, one folder each")
    parser.add_argument("--model", default="", help="folder of a causal language model, for e2e")
    parser.add_argument(
        "--estimators", nargs="+", default=list(ESTIMATORS), help="{steps}: those of the task"
    )
    parser.add_argument("--epsilons", type=float, nargs="+", default=[2.0, 8.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--rounds", type=int, default=7, help="of step times; 0: none")
    parser.add_argument("--steps", type=int, help="for a trial")
    parser.add_argument("--num-records", type=int, help="for a trial")
    parser.add_argument("--out", type=Path, help="default: benchmarks/estimators_<processor>_<date>.md")
    options = parser.parse_args(words)
    for task in options.task:
        if PLANS[task].folder and not options.data:
            parser.error(
                f"expected --data for {task}; got none; give the folder that holds {PLANS[task].folder}"
            )
    if "e2e" in options.task and not options.model:
        parser.error("expected --model for e2e; got none; give the folder of a causal language model")
    if SEED in options.seeds:
        parser.error(f"expected seeds other than {SEED}; got it; the grid uses it")
    return options


@contextmanager
def bar(what: str):
    """A progress bar, as a function of how many are done of how many."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        line = progress.add_task(what)
        yield lambda done, total: progress.update(line, completed=done, total=total)


def plan_of(options: argparse.Namespace, task: str) -> Plan:
    plan = PLANS[task]
    steps, records = options.steps or plan.steps, options.num_records or plan.num_records
    return replace(plan, steps=steps, num_records=records)


def step_times(
    path: Path, task: str, plan: Plan, places: Places, names: list[str], rounds: int,
    report: Callable[[int, int], None],
) -> dict[str, float]:  # fmt: skip
    """The ratios in the file if they are of these estimators, else new ones, appended."""
    held = [entry["times"] for entry in entries(path) if entry.get("times_of") == task]
    known: dict[str, float] = held[-1] if held else {}
    if rounds == 0 or set(names) <= set(known):
        return known
    found = dict(ratios(task, plan, places, names, rounds, report))
    append(path, {"times_of": task, "times": found})
    return found


def outcome_of(options: argparse.Namespace, task: str, path: Path) -> Outcome:
    """Calibrate, tune, run and time one task, as far as the file does not hold it."""
    plan, places = plan_of(options, task), Places(options.data, options.model)
    names = [name.replace("{steps}", str(plan.steps)) for name in options.estimators]
    noise = {
        (name, epsilon): noise_for(name, plan, epsilon) for name in names for epsilon in options.epsilons
    }
    with bar(f"{task}: grid") as report:
        tried = run_all(grid_jobs(task, plan, noise), path, places, plan, options.jobs, report)
    pairs = chosen(tried.values(), plan)
    with bar(f"{task}: runs") as report:
        jobs = final_jobs(task, plan, noise, pairs, options.seeds)
        found = run_all(jobs, path, places, plan, options.jobs, report)
    with bar(f"{task}: step times") as report:
        times = step_times(path, task, plan, places, names, options.rounds, report)
    return Outcome(task, plan, noise, pairs, list(found.values()), times)


def markdown(outcomes: list[Outcome], options: argparse.Namespace, picture: str, around: dict) -> str:
    """The report of all tasks."""
    parts = [
        "# Gradient estimators beyond plain clipping",
        described(around),
        f"`{command_line('benchmarks.estimators', sys.argv[1:])}`, {options.jobs} runs at a time, one thread each.",
        f"Every run of a column keeps the same epsilon at delta {DELTA:g} (one record added or removed, accountant "
        f"{ACCOUNTANT}); each estimator has the noise multiplier that its own charge allows: `dice` is charged its "
        "feedback without amplification. Clip norm and learning rate of each estimator and epsilon: the best of one "
        f"grid, the same for all, on one seed that no figure uses ({SEED}); the choice is not charged. A star: at the "
        "end of the rates. The estimators' other numbers are their defaults, untuned. Step / flat: user time, "
        "interleaved in one process, medians. Seeded, hence for benchmarks only.",
        f"![utility]({picture})",
    ]
    return "\n\n".join(parts + [section(outcome) for outcome in outcomes])


def main(words: list[str] | None = None) -> None:
    """Run every task and write the report after each."""
    options = arguments(words)
    out = options.out or default_path("estimators")
    outcomes: list[Outcome] = []
    started = time.perf_counter()
    for task in options.task:
        outcomes.append(outcome_of(options, task, out.with_suffix(".jsonl")))
        draw(outcomes, out.with_suffix(".png"))
        around = surroundings() | {"threads": 1}
        figures = {
            "command": command_line("benchmarks.estimators", sys.argv[1:]),
            "surroundings": around,
            "delta": DELTA,
            "floor": FLOOR,
            "minutes": (time.perf_counter() - started) / 60,
            "tasks": {
                outcome.task: {
                    "plan": asdict(outcome.plan),
                    "runs": [asdict(run) for run in outcome.runs],
                    "step_times": dict(outcome.times),
                }
                for outcome in outcomes
            },
        }
        write(out, markdown(outcomes, options, out.with_suffix(".png").name, around), figures)


if __name__ == "__main__":
    main()
