# SPDX-License-Identifier: Apache-2.0
"""The tables of the estimators: utility with spread, step time, noise, and what the grid chose."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.estimators.runs import Finished
from benchmarks.estimators.stepping import FLOOR
from benchmarks.estimators.tasks import Plan
from benchmarks.estimators.tuning import Setting
from benchmarks.report import table


@dataclass(frozen=True)
class Outcome:
    """All that is known of one task; `times` are ratios to `FLOOR`, of `FLOOR` itself seconds a step."""

    task: str
    plan: Plan
    noise: Mapping[Setting, float]
    pairs: Mapping[Setting, tuple[float, float]]
    runs: Sequence[Finished]
    times: Mapping[str, float]

    @property
    def estimators(self) -> list[str]:
        """In the order of the table."""
        return list(dict.fromkeys(estimator for estimator, _ in self.noise))

    @property
    def epsilons(self) -> list[float]:
        """Ascending."""
        return sorted({epsilon for _, epsilon in self.noise})

    def values(self, score: str, setting: Setting) -> list[float]:
        """The score of each seed in order; a run that failed counts as not a number."""
        return [
            run.scores.get(score, math.nan)
            for run in sorted(self.runs, key=lambda run: run.job.seed)
            if (run.job.estimator, run.job.epsilon) == setting
        ]


def shown(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    if not all(math.isfinite(value) for value in values):
        return "diverges"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    size = abs(statistics.mean(values))
    digits = 1 if size >= 10 else 3 if size >= 0.1 else 4
    return f"{statistics.mean(values):.{digits}f}{spread}"


def beside(values: Sequence[float], floor: Sequence[float]) -> str:
    """Mean difference from plain clipping and its standard error: seeds share data, weights and draws."""
    found = [a - b for a, b in zip(values, floor, strict=False)]
    if len(found) < 2 or not all(math.isfinite(x) for x in found):
        return "-"
    error = statistics.stdev(found) / math.sqrt(len(found))
    return f"{statistics.mean(found):+.2g} ± {error:.1g}"


def at_edge(plan: Plan, pair: tuple[float, float]) -> bool:
    """Whether the rates of the grid might have ended too early."""
    clip_norm, rate = pair
    here = rate * clip_norm if plan.relative else rate
    return len(plan.rates) > 1 and any(math.isclose(here, end) for end in (min(plan.rates), max(plan.rates)))


def _cells(outcome: Outcome, estimator: str) -> list[str]:
    settings = [(estimator, epsilon) for epsilon in outcome.epsilons]
    cells = [f"`{estimator}`"]
    cells += [shown(outcome.values(score, s)) for score in outcome.plan.scores for s in settings]
    first = outcome.plan.scores[0]
    for epsilon in outcome.epsilons:
        floor = outcome.values(first, (FLOOR, epsilon))
        same = estimator == FLOOR
        cells.append("" if same else beside(outcome.values(first, (estimator, epsilon)), floor))
    if estimator == FLOOR and FLOOR in outcome.times:
        cells.append(f"1 ({outcome.times[FLOOR] * 1e3:.1f} ms)")
    else:
        cells.append(f"{outcome.times[estimator]:.2f}" if estimator in outcome.times else "-")
    cells.append(", ".join(f"{outcome.noise[s]:.3f}" for s in settings))
    pairs = [(outcome.pairs[s]) for s in settings if s in outcome.pairs]
    cells.append("; ".join(f"{c:g}, {r:.3g}{'*' if at_edge(outcome.plan, (c, r)) else ''}" for c, r in pairs))
    return cells


def section(outcome: Outcome) -> str:
    """One task: what it is, and its table."""
    plan = outcome.plan
    columns = [f"{score}, epsilon {epsilon:g}" for score in plan.scores for epsilon in outcome.epsilons]
    columns += [f"less {FLOOR}, epsilon {epsilon:g}" for epsilon in outcome.epsilons]
    header = ("estimator", *columns, "step / flat", "noise multipliers", "clip norm, learning rate")
    rows = [_cells(outcome, estimator) for estimator in outcome.estimators]
    seeds = sorted({run.job.seed for run in outcome.runs})
    grid = f"{len(plan.clip_norms)} clip norms ({_listed(plan.clip_norms)}) by {len(plan.rates)} rates ({_listed(plan.rates)}"
    timing = "" if plan.timing_batch is None else f" Steps were timed at batches of {plan.timing_batch}."
    return (
        f"## {plan.title}\n\n{plan.about[0].upper()}{plan.about[1:]}. {plan.num_records} records, Poisson batches of "
        f"{plan.batch_size} expected, {plan.steps} steps of {'SGD' if plan.optimizer == 'sgd' else 'AdamW'} with linear "
        f"decay; {'less' if plan.lower else 'more'} is better. Grid for each estimator and epsilon: {grid}"
        f"{', learning rate times clip norm' if plan.relative else ''}). Mean ± standard deviation over {len(seeds)} "
        f'seeds; "less {FLOOR}": mean difference and standard error, pairs of the same seed.{timing}\n\n{table(header, rows)}'
    )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
