# SPDX-License-Identifier: Apache-2.0
"""Where the time of a private step goes: exclusive timers around private functions, set here and taken back.

A function that moved since is reported as missing, never as zero. The timers of one step add up to its wall
time, because each of them stops while another one, called from it, runs. CPU time stands beside it.
"""

from __future__ import annotations

import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

from benchmarks.models import build, optimizer_for
from benchmarks.timing import Quartiles, quartiles
from benchmarks.variants import CLIP_NORM, NOISE_MULTIPLIER, private_run
from clipping import FlatClipper
from dpopt import GaussianMechanism

INSIDE = (
    ("capture (rules)", "clipping.recording.deliveries", "Deliveries", "deliver"),
    ("norms", "clipping.collectors.one_pass", None, "settled"),
    ("norms", "clipping.collectors.one_pass", None, "norms"),
    ("weighted sums", "clipping.collectors.one_pass", "Sums", "add"),
    ("noise", "dpopt.mechanisms.gaussian", "GaussianMechanism", "release"),
    ("ledger", "accountants.ledger.ledger", "Ledger", "charge"),
)
"""(phase, module, class or None, function)."""


class Clock:
    """Exclusive seconds by phase, of CPU time and of wall time; those of the last step."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._since = (0.0, 0.0)

    def clear(self) -> None:
        """Start a step."""
        self.cpu.clear()
        self.wall.clear()

    def _turn(self) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        if self._stack:
            self.cpu[self._stack[-1]] += cpu - self._since[0]
            self.wall[self._stack[-1]] += wall - self._since[1]
        self._since = (cpu, wall)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`, except inner phases."""
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted as `name`."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed


@contextmanager
def timers(clock: Clock) -> Iterator[list[str]]:
    """Set the timers of `INSIDE`; yields the functions that were not found."""
    missing: list[str] = []
    restore: list[tuple[Any, str, Any]] = []
    for name, module, cls, attribute in INSIDE:
        owner: Any = importlib.import_module(module)
        owner = getattr(owner, cls, None) if cls else owner
        function = getattr(owner, attribute, None)
        if function is None:
            missing.append(f"{module}.{attribute}")
            continue
        restore.append((owner, attribute, function))
        setattr(owner, attribute, clock.around(name, function))
    try:
        yield missing
    finally:
        for owner, attribute, function in restore:
            setattr(owner, attribute, function)


@dataclass(frozen=True)
class Phase:
    """Seconds of one phase over the profiled steps."""

    cpu: Quartiles
    wall: Quartiles


def floor_phases(model: str, rounds: int) -> dict[str, Phase]:
    """Seconds of each phase of the non-private step."""
    task = build(model)
    optimizer = optimizer_for(task.model)

    def step(clock: Clock) -> None:
        with clock.phase("forward"):
            losses = task.losses(task.forward(task.model), task.labels)
        with clock.phase("backward"):
            losses.mean().backward()
        with clock.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return _profile(step, Clock(), rounds)


def private_phases(model: str, rounds: int) -> tuple[dict[str, Phase], list[str]]:
    """Seconds of each phase of the flat private step, and the functions that could not be timed."""
    task = build(model)
    optimizer = optimizer_for(task.model)
    clock = Clock()
    with (
        private_run(task, FlatClipper(CLIP_NORM), GaussianMechanism(NOISE_MULTIPLIER)) as private,
        timers(clock) as missing,
    ):
        batches = private.batches(range(task.batch_size), steps=1 << 60)

        def step(clock: Clock) -> None:
            with clock.phase("draw and release, the rest"):
                next(batches)
            with clock.phase("forward"):
                losses = task.losses(task.forward(task.model), task.labels)
            with clock.phase("backward"):
                private.accumulate(losses)
            with clock.phase("draw and release, the rest"):
                private.release()
            with clock.phase("optimizer"):
                optimizer.step()
                optimizer.zero_grad()

        return _profile(step, clock, rounds), missing


def _profile(step: Callable[[Clock], None], clock: Clock, rounds: int) -> dict[str, Phase]:
    cpu: dict[str, list[float]] = defaultdict(list)
    wall: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 2):
        clock.clear()
        step(clock)
        if number >= 2:  # the first steps probe, allocate and warm up
            for name in clock.cpu:
                cpu[name].append(clock.cpu[name])
                wall[name].append(clock.wall[name])
    return {name: Phase(quartiles(cpu[name]), quartiles(wall[name])) for name in cpu}
