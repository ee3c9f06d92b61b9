# SPDX-License-Identifier: Apache-2.0
"""What the embedded default reaches: `dpopt finetune` without options, beside no privacy: `python -m benchmarks.embedded`.

The same function that the command calls, at several epsilons and seeds; the runs without privacy have no noise
and a clip norm that no gradient meets. Held out: the embedded validation records, docstrings of other modules.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.finetuning import Example, Run, held_out, load
from benchmarks.report import command_line, default_path, described, surroundings, write
from benchmarks.utility import summary

NO_CLIPPING = 1e6
TOKENS = 128


@dataclass(frozen=True)
class Job:
    """One run; epsilon None is the run without privacy."""

    epsilon: float | None
    seed: int
    options: dict[str, Any]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded", description=__doc__)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[3.0, 8.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="default: that of dpopt finetune; so the others")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, help="default: benchmarks/embedded_<processor>_<date>.md")
    return parser.parse_args()


def loss_of(model: Any, tokenizer: Any) -> float:
    """Nats per token on the embedded validation records, each cut at `TOKENS` tokens."""
    from dpopt.embedded import private_records

    texts = list(private_records().validation)
    encoded = tokenizer(texts, verbose=False).input_ids
    end = tokenizer.eos_token_id
    examples = [Example((*ids, end)[:TOKENS], 0) for ids in encoded]
    return held_out(model, examples, tokenizer.pad_token_id)


def work(job: Job) -> Run | str:
    """Make one run on one thread; a line that says why where it failed."""
    import torch

    from dpopt.finetune import FinetuneConfig, finetune

    torch.set_num_threads(1)
    privacy: dict[str, Any] = {"epsilon": job.epsilon}
    if job.epsilon is None:
        privacy = {"noise_multiplier": 0.0, "clip_norm": NO_CLIPPING}
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = FinetuneConfig(
                **job.options, **privacy, seed=job.seed, insecure_seed=job.seed,
                max_tokens=TOKENS, device="cpu", out=Path(folder) / "run",
            )  # fmt: skip
            started = time.perf_counter()
            listener = _Noise()
            result = finetune(config, listener=listener)
            seconds = time.perf_counter() - started
    except Exception as error:
        return f"epsilon {job.epsilon}, seed {job.seed}: {type(error).__name__}: {error}"
    run = Run(
        "non-private" if job.epsilon is None else "dpopt finetune", job.epsilon, job.seed,
        listener.noise_multiplier, listener.learning_rate, loss_of(result.model, result.tokenizer), seconds,
    )  # fmt: skip
    print(f"  {asdict(run)}", flush=True)
    return run


class _Noise:
    """Listens for what the plan settled."""

    noise_multiplier = 0.0
    learning_rate = 0.0

    def stage(self, text: str) -> None:
        """Nothing."""

    def planned(self, plan: Any) -> None:
        """Keep the noise multiplier and the learning rate."""
        self.noise_multiplier = plan.privacy.noise_multiplier
        self.learning_rate = plan.learning_rate

    def stepped(self, seen: object) -> None:
        """Nothing."""


def main() -> None:
    from transformers import AutoTokenizer

    from dpopt.embedded import model_path

    started = time.perf_counter()
    options = arguments()
    named = ("steps", "batch_size", "learning_rate", "lora_rank")
    chosen = {name: getattr(options, name) for name in named if getattr(options, name) is not None}
    base = loss_of(load(model_path()), AutoTokenizer.from_pretrained(model_path()))
    print(f"before training: {base:.4f} nats per token", flush=True)
    jobs = [Job(epsilon, seed, chosen) for epsilon in (*options.epsilons, None) for seed in options.seeds]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(work, jobs))
    runs = [result for result in results if isinstance(result, Run)]
    failures = [result for result in results if isinstance(result, str)]
    around = surroundings() | {"threads": 1}
    minutes = (time.perf_counter() - started) / 60
    settings = ", ".join(f"{name} {value}" for name, value in chosen.items()) or "all defaults"
    command = command_line("benchmarks.embedded", sys.argv[1:])
    parts = [
        "# The embedded default",
        described(around),
        f"`{command}` took {minutes:.1f} minutes, {options.jobs} runs at a time.",
        f"`dpopt.finetune.finetune` on the embedded model and records: {settings}. Seconds include reading the "
        "records and pricing. Seeded, hence for benchmarks only.",
        summary(runs, base),
        *(f"- failed: {failure}" for failure in failures),
    ]
    figures = {
        "command": command,
        "surroundings": around,
        "base_nll": base,
        "runs": [asdict(run) for run in runs],
        "failures": failures,
        "minutes": minutes,
    }
    write(options.out or default_path("embedded"), "\n\n".join(parts), figures)


if __name__ == "__main__":
    main()
