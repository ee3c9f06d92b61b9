# SPDX-License-Identifier: Apache-2.0
"""Step times of estimators: all in one process, alternating, each round compared with the plain step of that round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from benchmarks.estimators.runs import evaluate, job_of, optimizer_of, training
from benchmarks.estimators.tasks import TASKS, Places, Plan
from benchmarks.timing import MIN_SAMPLE_SECONDS, quartiles, user_seconds

FLOOR = "flat"
STEPS = 10
"""A sample takes a multiple of this: whole periods of an estimator that restarts every 10."""


def _steps(stack: ExitStack, task: str, plan: Plan, places: Places, estimator: str) -> Iterator[None]:
    """An iterator each `next` of which runs one step, learning rate and noise as good as any."""
    problem = TASKS[task](places, plan, 0)
    job = job_of(task, plan, estimator, 0.0, 1.0, (plan.clip_norms[0], 1e-3), 0)
    optimizer = optimizer_of(plan, problem.model, job.learning_rate)
    private = stack.enter_context(training(job, plan, problem.model))

    def steps() -> Iterator[None]:
        for batch in private.batches(range(plan.num_records), steps=1 << 20):
            evaluate(private, problem, batch, plan.micro_batch)
            private.release()
            optimizer.step()
            yield

    return steps()


def _count(steps: Iterator[None]) -> int:
    """How many steps make a sample long enough, in whole periods; a warm-up, too."""
    started = time.perf_counter()
    for _ in range(STEPS):
        next(steps)
    return STEPS * math.ceil(MIN_SAMPLE_SECONDS / (time.perf_counter() - started))


def ratios(
    task: str,
    plan: Plan,
    places: Places,
    estimators: Sequence[str],
    rounds: int,
    report: Callable[[int, int], None],
) -> Mapping[str, float]:
    """Median over rounds of user time over that of `FLOOR`; of `FLOOR` itself, seconds a step."""
    torch.set_num_threads(1)
    plan = replace(plan, batch_size=plan.timing_batch or plan.batch_size)
    with ExitStack() as stack:
        names = list(dict.fromkeys((FLOOR, *estimators)))
        running = {name: _steps(stack, task, plan, places, name) for name in names}
        counts = {name: _count(running[name]) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                started = user_seconds()
                for _ in range(counts[name]):
                    next(running[name])
                times[name].append((user_seconds() - started) / counts[name])
            report(number + 1, rounds)
        for steps in running.values():
            steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    floor = times[FLOOR]
    found = {
        name: quartiles([a / b for a, b in zip(times[name], floor, strict=True)]).median for name in names
    }
    return found | {FLOOR: quartiles(floor).median}
