# SPDX-License-Identifier: Apache-2.0
"""What privacy costs in quality: E2E fine-tuning with dpopt, Opacus and no privacy: `python -m benchmarks.utility`.

Prompt "{meaning representation} |", then the reference, whose tokens alone are counted. One record is one row.
The learning rate is chosen once, with dpopt, at the largest epsilon, on other rows than those of the figures.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.finetuning import Example, Job, Run, Settings, held_out, load, work
from benchmarks.report import command_line, default_path, described, surroundings, table, write
from dpopt import noise_multiplier

MAX_TOKENS = 256


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.utility", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.jsonl and validation.jsonl"
    )
    parser.add_argument("--epsilons", type=float, nargs="+", default=[3.0, 8.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--num-train", type=int, default=10_000)
    parser.add_argument("--num-validation", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=250, help="expected; must divide --num-train")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--clip-norm", type=float, default=1.0)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--libraries", nargs="+", default=["dpopt", "opacus", "non-private"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, help="default: benchmarks/utility_<processor>_<date>.md")
    options = parser.parse_args()
    if options.num_train % options.batch_size:
        parser.error("expected --batch-size to divide --num-train: Opacus samples at 1 / number of batches")
    return options


def encode(tokenizer: Any, row: dict[str, str]) -> Example:
    """One row; the prompt is what the tokens of prompt and whole text have in common."""
    prompt = tokenizer(f"{row['mr']} |").input_ids
    ids = tokenizer(f"{row['mr']} | {row['ref']}").input_ids[:MAX_TOKENS]
    common = 0
    while common < min(len(prompt), len(ids)) and prompt[common] == ids[common]:
        common += 1
    return Example(tuple(ids), common)


def read(path: Path, tokenizer: Any, count: int | None = None) -> list[Example]:
    """The rows of a file in one fixed random order, the first `count` of them."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(0).shuffle(rows)
    return [encode(tokenizer, row) for row in rows[:count]]


def run_all(jobs: Sequence[Job], processes: int) -> tuple[list[Run], list[str]]:
    """The finished runs and why others failed; `processes` of them at a time."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(work, jobs))
    failures = [result for result in results if isinstance(result, str)]
    for failure in failures:
        print(f"  failed: {failure}")
    return [result for result in results if isinstance(result, Run)], failures


def noise_for(options: argparse.Namespace, epsilon: float) -> float:
    """The noise multiplier of every private run at `epsilon`."""
    rate = options.batch_size / options.num_train
    return noise_multiplier(epsilon=epsilon, delta=options.delta, sampling_rate=rate, steps=options.steps)


def tuned(options: argparse.Namespace, rows: Sequence[Example], pad: int) -> tuple[float, list[Run]]:
    """The best of `--learning-rates` on rows that no figure uses, and the runs that say so."""
    rates = options.learning_rates
    if len(rates) == 1:
        return rates[0], []
    count = options.num_train
    epsilon = max(options.epsilons)
    jobs = [
        Job(
            options.model, tuple(rows[:count]), tuple(rows[count : count + options.num_validation]), pad,
            settings(options, rate), "dpopt", epsilon, noise_for(options, epsilon), 1000,
        )
        for rate in rates
    ]  # fmt: skip
    runs, _ = run_all(jobs, options.jobs)
    return min(runs, key=lambda run: run.nll).learning_rate, runs


def settings(options: argparse.Namespace, learning_rate: float) -> Settings:
    """The settings of the command line at one learning rate."""
    return Settings(options.steps, options.batch_size, options.micro_batch, learning_rate, options.clip_norm)


def plan(options: argparse.Namespace, rate: float, train: Iterable[Example], validation: Iterable[Example], pad: int) -> list[Job]:  # fmt: skip
    """Every run: libraries x epsilons x seeds, and the non-private ones once for each seed."""
    noise = {epsilon: noise_for(options, epsilon) for epsilon in options.epsilons}
    chosen: list[tuple[str, float | None, float]] = []
    for library in options.libraries:
        if library == "non-private":
            chosen.append((library, None, 0.0))
        else:
            chosen += [(library, epsilon, noise[epsilon]) for epsilon in options.epsilons]
    train, validation = tuple(train), tuple(validation)
    return [
        Job(options.model, train, validation, pad, settings(options, rate), library, epsilon, sigma, seed)
        for library, epsilon, sigma in chosen
        for seed in options.seeds
    ]


def summary(runs: Sequence[Run], base: float) -> str:
    """One row for each library and epsilon: mean and spread over seeds."""
    rows = [("before training", "", "", f"{base:.4f}", "", "")]
    for library, epsilon in dict.fromkeys((run.library, run.epsilon) for run in runs):
        group = [run for run in runs if (run.library, run.epsilon) == (library, epsilon)]
        values = [run.nll for run in group]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        rows.append(
            (
                library,
                "-" if epsilon is None else f"{epsilon:g}",
                f"{group[0].noise_multiplier:.4f}",
                f"{statistics.mean(values):.4f}{spread}",
                f"{min(values):.4f} to {max(values):.4f}",
                f"{statistics.median(run.seconds for run in group):.0f}",
            )
        )
    header = (
        "run", "epsilon", "noise multiplier", "held-out nats per token, mean ± sd", "range", "seconds"
    )  # fmt: skip
    return table(header, rows)


def main() -> None:
    from transformers import AutoTokenizer

    started = time.perf_counter()
    options = arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = read(options.data / "train.jsonl", tokenizer, 2 * options.num_train + options.num_validation)
    train, others = rows[: options.num_train], rows[options.num_train :]
    validation = read(options.data / "validation.jsonl", tokenizer, options.num_validation)
    base = held_out(load(options.model), validation, pad)
    print(f"before training: {base:.4f} nats per token", flush=True)
    rate, tuning = tuned(options, others, pad)
    print(f"learning rate {rate:g}", flush=True)
    runs, failures = run_all(plan(options, rate, train, validation, pad), options.jobs)
    around = surroundings() | {"threads": 1}
    minutes = (time.perf_counter() - started) / 60
    parts = [
        f"# Utility: {options.model.name} on {options.data.name}",
        described(around),
        f"`{command_line('benchmarks.utility', sys.argv[1:])}` took {minutes:.1f} minutes, "
        f"{options.jobs} runs at a time.",
        f"{options.num_train} records, Poisson batches of {options.batch_size} expected, {options.steps} steps, clip "
        f"norm {options.clip_norm:g}, AdamW at {rate:g} without decay, delta {options.delta:g} (one record added or "
        "removed, PRV accountant); all libraries use the noise multipliers of the table. Held out: "
        f"{options.num_validation} rows. Seeded, hence for benchmarks only.",
        summary(runs, base),
    ]
    if tuning:
        grid = ", ".join(f"{run.learning_rate:g}: {run.nll:.4f}" for run in tuning)
        parts.append(f"Learning rates tried once, on other rows (taken as public, not charged): {grid}.")
    parts += [f"- failed: {failure}" for failure in failures]
    figures = {
        "command": command_line("benchmarks.utility", sys.argv[1:]),
        "surroundings": around,
        "settings": asdict(settings(options, rate))
        | {"delta": options.delta, "num_train": options.num_train},
        "base_nll": base,
        "runs": [asdict(run) for run in runs],
        "tuning": [asdict(run) for run in tuning],
        "failures": failures,
        "minutes": minutes,
    }
    write(options.out or default_path("utility"), "\n\n".join(parts), figures)


if __name__ == "__main__":
    main()
