# SPDX-License-Identifier: Apache-2.0
"""Which clip norm and learning rate each estimator gets: the same grid for all, on one seed of its own.

The choice is not charged: it sees other records (or another split and other noise) than the figures do, and it
sees them for every estimator alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from benchmarks.estimators.runs import Finished, Job, job_of
from benchmarks.estimators.tasks import Plan

SEED = 1000

Setting = tuple[str, float]
"""Estimator and epsilon."""


def grid_jobs(task: str, plan: Plan, noise: Mapping[Setting, float]) -> list[Job]:
    """Every pair of the grid, for every estimator and epsilon."""
    return [
        job_of(task, plan, estimator, epsilon, sigma, pair, SEED)
        for (estimator, epsilon), sigma in noise.items()
        for pair in plan.grid
    ]


def score(finished: Finished, plan: Plan) -> float:
    """The tuned score, less is better; infinite where the run failed or diverged."""
    value = finished.scores.get(plan.scores[0], math.inf)
    if not math.isfinite(value):
        return math.inf
    return value if plan.lower else -value


def chosen(runs: Iterable[Finished], plan: Plan) -> dict[Setting, tuple[float, float]]:
    """The best pair of clip norm and learning rate of each estimator and epsilon."""
    best: dict[Setting, Finished] = {}
    for run in runs:
        setting = (run.job.estimator, run.job.epsilon)
        if setting not in best or score(run, plan) < score(best[setting], plan):
            best[setting] = run
    return {setting: (run.job.clip_norm, run.job.learning_rate) for setting, run in best.items()}


def final_jobs(
    task: str,
    plan: Plan,
    noise: Mapping[Setting, float],
    pairs: Mapping[Setting, tuple[float, float]],
    seeds: Iterable[int],
) -> list[Job]:
    """The runs of the table, seed by seed so that an early report has some of each."""
    return [
        job_of(task, plan, estimator, epsilon, sigma, pairs[estimator, epsilon], seed)
        for seed in seeds
        for (estimator, epsilon), sigma in noise.items()
    ]
