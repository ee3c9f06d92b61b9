# SPDX-License-Identifier: Apache-2.0
"""How far a reader walks through one step: files entered and moves between them, Opacus' step beside ours.

python -m benchmarks.path [--files] [--time] [--write NAME.json] [--against NAME.json]

Counts what Python's tracer sees of one step after warm-up: a file is entered where a function of it is called, and a move is
a call in another file of the project than the call before. Time plays no part, so the counts are the same on every machine.
On draws 1, 2, 4, 8, ... of a run the batch is followed through the loop, operation by operation: that step is shown apart,
and so is one whose batch is as large as an earlier one.
`--write` keeps them, and `--against` prints those of an earlier file first. `--time` adds the process time of a step, in
rounds that take turns; waiting for the disk, which each charge does, is no part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpopt import PrivacyEngine

RECORDS, BATCH = 640, 32
ORDINARY, FOLLOWED = 3, 4
"""Which steps of a run are traced."""
OURS = ("accountants", "clipping", "dpopt")

Phases = Mapping[str, Callable[[], object]]
"""The parts of a step by name, in the order in which they run."""


@dataclass(frozen=True)
class Walk:
    """The files of the project in which a step called functions, one entry for each call, by part of the step."""

    calls: Mapping[str, Sequence[str]]

    def of(self, phase: str | None = None) -> Sequence[str]:
        """The calls of one part, or of the whole step."""
        parts = self.calls.values() if phase is None else (self.calls[phase],)
        return [name for part in parts for name in part]

    def files(self, phase: str | None = None) -> int:
        """How many files are entered."""
        return len(set(self.of(phase)))

    def moves(self, phase: str | None = None) -> int:
        """How many calls are in another file than the call before."""
        calls = self.of(phase)
        return sum(a != b for a, b in zip(("", *calls), calls, strict=False))


def walked(phases: Phases, packages: Iterable[str]) -> Walk:
    """Trace one step, in the files of `packages`."""
    specs = {package: find_spec(package) for package in packages}
    folders = {f"{Path(spec.origin).parent}/": p for p, spec in specs.items() if spec and spec.origin}
    names: dict[str, str] = {}
    calls: dict[str, list[str]] = {}

    def named(file: str) -> str:
        if file not in names:
            found = (f"{p}/{file.removeprefix(d)}" for d, p in folders.items() if file.startswith(d))
            names[file] = next(found, "")
        return names[file]

    for phase, work in phases.items():
        seen: list[str] = []

        def trace(frame: FrameType, event: str, _: Any, seen: list[str] = seen) -> None:
            if event == "call" and (name := named(frame.f_code.co_filename)):
                seen.append(name)

        before = sys.gettrace()
        threading.settrace(trace)  # backward may run in threads of its own
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(before)
            threading.settrace(before)  # pyright: ignore[reportArgumentType]
        calls[phase] = seen
    return Walk(calls)


def task() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """A perceptron of two layers, 20-64-2, and 640 records."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    data = TensorDataset(torch.randn(RECORDS, 20), torch.randint(0, 2, (RECORDS,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=BATCH)


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable[Any]) -> Phases:
    """One turn of an ordinary loop, part by part."""
    batches, kept = itertools.chain.from_iterable(itertools.repeat(loader)), {}

    def batch() -> int:
        kept["inputs"], kept["labels"] = next(batches)
        optimizer.zero_grad()
        return len(kept["inputs"])

    def forward() -> None:
        kept["loss"] = nn.functional.cross_entropy(model(kept["inputs"]), kept["labels"])

    return {
        "batch": batch,
        "forward": forward,
        "backward": lambda: kept["loss"].backward(),
        "step": optimizer.step,
    }


@contextmanager
def ours() -> Iterator[Phases]:
    """The step of `dpopt.PrivacyEngine`, its ledger on disk."""
    model, optimizer, loader = task()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        with PrivacyEngine(ledger=Path(folder) / "ledger.jsonl") as engine:
            made = engine.make_private(
                module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
            )
            yield loop(*made)


@contextmanager
def opacus() -> Iterator[Phases]:
    """The step of Opacus' engine of the same name, in its default mode."""
    model, optimizer, loader = task()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import PrivacyEngine as Peer

        made: Any = Peer().make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
        )
        yield loop(*made)


def measured() -> dict[str, Walk]:
    """One step of each, after warm-up."""
    found = {}
    for name, made, packages, number in (
        ("dpopt", ours, OURS, ORDINARY),
        ("dpopt, a followed step", ours, OURS, FOLLOWED),
        ("Opacus", opacus, ("opacus",), ORDINARY),
    ):
        if not all(find_spec(package) for package in packages):
            continue
        with made() as phases:
            for _ in range(number - 1):
                for work in phases.values():
                    work()
            found[name] = walked(phases, packages)
    return {"dpopt, a size seen before": settled(), **found}


def settled() -> Walk:
    """The first ordinary step whose batch is as large as that of an earlier one: its loss was looked at then."""
    sizes: list[Any] = []
    with ours() as phases:
        watched = {**phases, "batch": lambda: sizes.append(phases["batch"]())}
        for number in itertools.count(1):
            walk = walked(watched, OURS)
            # On powers of two the batch is followed, on powers of ten an example's row is sent back alone.
            if number <= 2 or number in (4, 8, 10, 16, 32, 64, 100):
                sizes.pop()
            elif sizes[-1] in sizes[:-1]:
                return walk
    raise AssertionError("the loop ends above")


@contextmanager
def plain() -> Iterator[Phases]:
    """The same loop without privacy."""
    yield loop(*task())


def timed(steps: range = range(32, 63), rounds: int = 10) -> dict[str, float]:
    """Milliseconds of process time that one of `steps` takes, none of them followed or probed, in rounds that take turns."""
    ways = {"non-private": plain, "dpopt": ours} | ({"Opacus": opacus} if find_spec("opacus") else {})
    found: dict[str, list[float]] = {name: [] for name in ways}
    for name, made in list(ways.items()) * rounds:
        with made() as phases:
            for number in range(steps.stop):
                if number == steps.start:
                    begun = time.process_time()
                for work in phases.values():
                    work()
            found[name].append((time.process_time() - begun) / len(steps) * 1000)
    return {name: statistics.median(values) for name, values in found.items()}


def table(walks: Mapping[str, Walk]) -> str:
    """One row for each library: calls, files and moves of a step, and of each of its parts."""
    parts = list(next(iter(walks.values())).calls)
    lines = [
        f"| one step of | calls | files | moves | {' | '.join(f'{part}: files, moves' for part in parts)} |",
        f"|---|---|---|---|{'---|' * len(parts)}",
    ]
    for name, walk in walks.items():
        cells = " | ".join(f"{walk.files(part)}, {walk.moves(part)}" for part in parts)
        lines.append(f"| {name} | {len(walk.of())} | {walk.files()} | {walk.moves()} | {cells} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", action="store_true", help="list the files too, in the order of entering")
    parser.add_argument("--time", action="store_true", help="the process time of a step too")
    parser.add_argument("--write", type=Path, help="keep the counts in this file")
    parser.add_argument("--against", type=Path, help="print the counts of this file first")
    options = parser.parse_args(words)
    walks = measured()
    if options.write is not None:
        options.write.write_text(json.dumps({n: asdict(walk) for n, walk in walks.items()}) + "\n")
    before = {} if options.against is None else json.loads(options.against.read_text())
    earlier = {f"{name}, before": Walk(**walk) for name, walk in before.items()}
    print(table(earlier | walks))
    for name, value in timed().items() if options.time else ():
        print(f"{name}: {value:.2f} ms of process time a step")
    for name, walk in walks.items() if options.files else ():
        calls = walk.of()
        print(f"\n{name}")
        print("\n".join(f"{calls.count(file):4} {file}" for file in dict.fromkeys(calls)))


if __name__ == "__main__":
    main()
