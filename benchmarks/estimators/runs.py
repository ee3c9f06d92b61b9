# SPDX-License-Identifier: Apache-2.0
"""One private run with an estimator, and a file of finished runs from which an interrupted benchmark goes on."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accountants import accountant
from benchmarks.estimators.problem import Problem
from benchmarks.estimators.tasks import TASKS, Places, Plan
from benchmarks.timing import reason
from dpopt import Budget, GaussianMechanism, PrivateTraining, poisson
from dpopt.budget.budget import noise_within
from dpopt.budget.prices import priced
from dpopt.estimators import Run, named_estimator
from dpopt.sampling import Batch, Sampling

ACCOUNTANT, DELTA = "pld", 1e-5


@dataclass(frozen=True)
class Job:
    """One run to make; all its fields together are its name in the file of runs."""

    task: str
    estimator: str
    epsilon: float
    noise_multiplier: float
    clip_norm: float
    learning_rate: float
    num_records: int
    batch_size: int
    steps: int
    seed: int


@dataclass(frozen=True)
class Finished:
    """What a run gave, or why it failed; `seconds` without drawing the data and without the scores."""

    job: Job
    scores: dict[str, float]
    seconds: float
    failure: str = ""


def sampling_of(plan: Plan) -> Sampling:
    return poisson(num_records=plan.num_records, batch_size=plan.batch_size)


def noise_for(estimator: str, plan: Plan, epsilon: float) -> float:
    """The noise multiplier of `plan.steps` steps of an estimator. It does not depend on clip norm and model."""
    sampling = sampling_of(plan)
    found = named_estimator(estimator, Run(nn.Linear(1, 1), 1.0, plan.num_records, sampling))
    return noise_within(Budget(epsilon, DELTA), accountant(ACCOUNTANT), priced(found, sampling, plan.steps))


def optimizer_of(plan: Plan, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Plain SGD, or AdamW without decay of the weights."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(trainable, lr=rate)
    return torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)


@contextlib.contextmanager
def training(job: Job, plan: Plan, model: nn.Module) -> Iterator[PrivateTraining]:
    """The private run of a job, repeatable and for benchmarks only, its ledger thrown away."""
    sampling = sampling_of(plan)
    estimator = named_estimator(job.estimator, Run(model, job.clip_norm, plan.num_records, sampling))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        private = PrivateTraining(
            model,
            estimator=estimator,
            mechanism=GaussianMechanism(job.noise_multiplier),
            sampling=sampling,
            accountant_name=ACCOUNTANT,
            ledger=Path(folder) / "ledger.jsonl",
            insecure_seed=job.seed,
        )
        with contextlib.redirect_stderr(io.StringIO()):
            stack.enter_context(private)
        yield private


def evaluate(private: PrivateTraining, problem: Problem, batch: Batch, size: int) -> None:
    """Everything of one step but the release: each micro-batch as often as the estimator asks."""
    indices = list(batch.indices)
    if problem.lengths is not None:
        indices.sort(key=problem.lengths.__getitem__)
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        private.evaluate(partial(problem.losses, part), records=part)


def made(job: Job, places: Places, plan: Plan) -> Finished:
    """Make one run on one thread; one that diverges until something refuses it is a result, too."""
    torch.set_num_threads(1)
    problem = TASKS[job.task](places, plan, job.seed)
    started = time.perf_counter()
    try:
        trained(job, problem, plan)
    except Exception as error:
        return Finished(job, {}, time.perf_counter() - started, reason(error))
    seconds = time.perf_counter() - started
    return Finished(job, dict(problem.scores()), seconds)


def trained(job: Job, problem: Problem, plan: Plan) -> None:
    """Train the model of a problem: linear decay of the learning rate to 0."""
    optimizer = optimizer_of(plan, problem.model, job.learning_rate)
    with training(job, plan, problem.model) as private:
        for step, batch in enumerate(private.batches(range(plan.num_records), steps=plan.steps)):
            evaluate(private, problem, batch, plan.micro_batch)
            private.release()
            for group in optimizer.param_groups:
                group["lr"] = job.learning_rate * (1 - step / plan.steps)
            optimizer.step()


def job_of(task: str, plan: Plan, estimator: str, epsilon: float, noise: float, pair: tuple[float, float], seed: int) -> Job:  # fmt: skip
    """The job at a pair of clip norm and learning rate."""
    return Job(task, estimator, epsilon, noise, *pair, plan.num_records, plan.batch_size, plan.steps, seed)


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of runs; one that an interruption cut short is left out."""
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add a line, on a line of its own even where the last one was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(entry) + "\n")


def read(path: Path) -> dict[Job, Finished]:
    """The finished runs of a file."""
    found: dict[Job, Finished] = {}
    for entry in entries(path):
        if "job" in entry:
            job = Job(**entry["job"])
            found[job] = Finished(job, entry["scores"], entry["seconds"], entry["failure"])
    return found


def run_all(
    jobs: Sequence[Job],
    path: Path,
    places: Places,
    plan: Plan,
    processes: int,
    report: Callable[[int, int], None],
) -> dict[Job, Finished]:
    """The finished runs of all `jobs`: those in the file, and the others, made now and appended one by one."""
    known = read(path)
    found = {job: known[job] for job in jobs if job in known}
    missing = [job for job in dict.fromkeys(jobs) if job not in known]
    total = len(found) + len(missing)
    report(len(found), total)
    for finished in _making(missing, places, plan, processes):
        found[finished.job] = finished
        append(path, asdict(finished))
        report(len(found), total)
    return found


def _making(jobs: Sequence[Job], places: Places, plan: Plan, processes: int) -> Iterator[Finished]:
    """The runs as they finish; one at a time needs no other process."""
    if processes == 1 or not jobs:
        yield from (made(job, places, plan) for job in jobs)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(made, job, places, plan) for job in jobs]):
            yield future.result()
