# SPDX-License-Identifier: Apache-2.0
"""Time, peak memory and host synchronisations of one training step, variant after variant, on one device.

A device runs at one clock, so variants run one after the other, with the memory of the last one given back; the
non-private step runs first and last, and the difference of the two is reported as drift.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.shapes import Cell, made
from benchmarks.timing import reason
from benchmarks.variants import FLOOR, Step, Variant
from clipping import kernels

WARM_UP = 2
SAMPLE_SECONDS = 1.0
FEWEST, MOST = 3, 20


@dataclass(frozen=True)
class Figure:
    """Median seconds of a step, how many were timed, peak bytes (0: not known), and host synchronisations (-1: not)."""

    seconds: float
    steps: int
    peak: int
    syncs: int


@dataclass
class Measured:
    """The figures of one cell by variant; why others did not run; the last non-private time over the first."""

    figures: dict[str, Figure] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    drift: float = 1.0


def forget(device: str) -> None:
    """Give back what earlier variants held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_of(step: Step, device: str) -> float:
    """Seconds of one step, by events of the device where it has some."""
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def syncs_of(step: Step, device: str) -> int:
    """How often one step makes the host wait for the device."""
    if device != "cuda":
        return -1
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


@contextmanager
def with_kernels(wanted: bool):
    """Triton kernels on, where they are trusted, or off."""
    if not wanted:
        with kernels.without():
            yield
        return
    kernels.enable()
    try:
        yield
    finally:
        kernels.enable(False)


def figure_of(cell: Cell, variant: Variant, device: str) -> Figure:
    """Warm a variant up, then time it for about a second."""
    forget(device)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        step = stack.enter_context(variant(made(cell, device)))
        for _ in range(WARM_UP):
            first = seconds_of(step, device)
        count = max(FEWEST, min(MOST, int(SAMPLE_SECONDS / first)))
        times = [seconds_of(step, device) for _ in range(count)]
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        return Figure(statistics.median(times), count, peak, syncs_of(step, device))


def measure(
    cell: Cell,
    variants: Iterable[tuple[str, Variant, bool]],
    device: str,
    *,
    left: Callable[[], float],
) -> Measured:
    """The figures of one cell; each variant comes with its name and whether kernels are on.

    What fails says why; what the time does not reach says so.
    """
    measured = Measured()
    floor: Variant | None = None
    for name, variant, fused in variants:
        floor = variant if name == FLOOR else floor
        if left() <= 0:
            measured.failures[name] = "no time left"
            continue
        try:
            with with_kernels(fused):
                measured.figures[name] = figure_of(cell, variant, device)
        except Exception as error:  # out of memory, or a peer that cannot run this model
            measured.failures[name] = reason(error)
    if floor is not None and FLOOR in measured.figures and left() > 0:
        measured.drift = figure_of(cell, floor, device).seconds / measured.figures[FLOOR].seconds
    forget(device)
    return measured
