# SPDX-License-Identifier: Apache-2.0
"""What canaries cost in time: `python -m benchmarks.audit_cost`.

Two runs on copies of the embedded language model, one with canaries, take turns step by step on the same batch of
records; compared are process times. Every canary that is in joins every step, which no real sampling rate has them do.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.report import command_line, default_path, described, surroundings, write
from dpopt import FlatClipper, GaussianMechanism, PoissonSampling, PrivateTraining
from dpopt.audit import Canaries
from dpopt.embedded import model_path
from dpopt.finetune.language_model import Tokens, collate, load, logits
from dpopt.losses import causal_lm_losses


def stepper(
    model: nn.Module, records: list[Tokens], folder: Path, num: int, size: int
) -> tuple[PrivateTraining, Callable[[], float]]:
    """A run, and a function that takes one step of it and tells the seconds of process time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    private = PrivateTraining(
        model, clipper=FlatClipper(1.0), mechanism=GaussianMechanism(1.0),
        sampling=PoissonSampling(1.0, float(len(records))), ledger=folder / f"{num}.jsonl", accountant_name="rdp",
        audit=Canaries(num) if num else None,
    )  # fmt: skip
    private.__enter__()
    batches = private.batches(records, steps=10**6)

    def step() -> float:
        started = time.process_time()
        for part in next(batches).parts(size):
            tokens = collate(part.examples, pad=0, device=torch.device("cpu"))  # pyright: ignore[reportArgumentType]
            private.accumulate(causal_lm_losses(logits(model, tokens), tokens.labels))
        private.release()
        optimizer.step()
        return time.process_time() - started

    return private, step


def main() -> None:
    """Read the command line, take steps in turn, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit_cost", description=__doc__)
    parser.add_argument("--canaries", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--records", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--physical", type=int, default=32)
    parser.add_argument("--out", type=Path, help="default: benchmarks/audit-cost_<processor>_<date>.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    base, _ = load(str(model_path()))
    source = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 2000, (settings.records, settings.tokens), generator=source)
    records = [Tokens(row, 0) for row in rows]
    figures: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        made = {
            n: stepper(copy.deepcopy(base), records, Path(folder), n, settings.physical)
            for n in (0, *settings.canaries)
        }
        seconds: dict[int, list[float]] = {n: [] for n in made}
        for number in range(settings.rounds + 2):
            order = list(made) if number % 2 else list(made)[::-1]
            for n in order:
                found = made[n][1]()
                if number >= 2:
                    seconds[n].append(found)
        for private, _ in made.values():
            private.__exit__(None, None, None)
    for n in settings.canaries:
        ratios = sorted(a / b for a, b in zip(seconds[n], seconds[0], strict=True))
        figures.append({
            "canaries": n, "ratio": statistics.median(ratios), "quarters": [ratios[len(ratios) // 4], ratios[-len(ratios) // 4]],
            "seconds": statistics.median(seconds[n]), "seconds_without": statistics.median(seconds[0]),
        })  # fmt: skip
    report(figures, settings)


def report(figures: list[dict[str, object]], settings: argparse.Namespace) -> None:
    """Write it as markdown and JSON."""
    around, command = surroundings(), command_line("benchmarks.audit_cost", sys.argv[1:])
    lines = [
        "# What canaries cost in time", "",
        f"Process time of a private step of the embedded model (1.07 million parameters, all trained) on {settings.records} records "
        f"of {settings.tokens} tokens, with canaries over without, step by step in turn, {settings.rounds} rounds: median and "
        f"quartiles. Half of the canaries join every step. `{command}`", "",
        "| canaries | ratio | quartiles | seconds | without |", "|---|---|---|---|---|",
        *(f"| {f['canaries']} | {f['ratio']:.3f} | {f['quarters'][0]:.3f} to {f['quarters'][1]:.3f} | "  # pyright: ignore
          f"{f['seconds']:.3f} | {f['seconds_without']:.3f} |" for f in figures), "",
        described(around), "",
    ]  # fmt: skip
    write(
        settings.out or default_path("audit-cost"),
        "\n".join(lines),
        {"rows": figures, "surroundings": around, "command": command},
    )


if __name__ == "__main__":
    main()
