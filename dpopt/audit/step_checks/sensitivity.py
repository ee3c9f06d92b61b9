# SPDX-License-Identifier: Apache-2.0
"""How far one record moves what a step releases: replayed on neighbouring batches without noise.

The measure is that of the Gaussian mechanism: sum_k (|movement of tensor k| / noise deviation of tensor k)^2 is at most
1 / noise_multiplier^2, for tensors with noise of one scale or of several. Losses that couple examples, clipping in the
wrong place, records counted twice and groups that forget their square root all show in this one number.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpopt.audit.step_checks.case import TrainingStep, released
from dpopt.audit.step_checks.findings import CAUTION, FAULT, HOLDS, UNCHECKED, Finding, statistical
from dpopt.audit.step_checks.records import WILD, Entry, Trial, both, trials

SLACK = 1e-3
"""Relative rounding that is not held against a step."""


@dataclass(frozen=True)
class Movement:
    """What one trial showed: how far each tensor moved, less what rounding may account for, or what went wrong."""

    trial: Trial
    norms: Mapping[str, float]
    rounding: Mapping[str, float]
    trouble: str = ""

    def over(self, stds: Mapping[str, float], noise_multiplier: float) -> float:
        """The movement over the largest that is allowed; `stds` are the noise deviations by tensor."""
        parts = [max(0.0, v - self.rounding[n]) / stds[n] for n, v in self.norms.items() if stds.get(n)]
        return math.hypot(*parts) * noise_multiplier / self.trial.bound


def movement(case: TrainingStep, trial: Trial, unit: float = torch.finfo(torch.float32).eps) -> Movement:
    """Replay one step on the two batches of a trial, without noise and from one seed; `unit` is what releases are rounded to."""
    sides: list[dict[str, Tensor] | None] = []
    failures: list[str] = []
    for batch in both(case, trial):
        try:
            sides.append(released(case, batch, noise_multiplier=0.0, seed=trial.seed))
        except Exception as error:  # whatever a user's step raises is an outcome
            sides.append(None)
            failures.append(f"{type(error).__name__}: {str(error)[:80]}")
    whole, rest = sides
    if whole is None and rest is None:
        return Movement(trial, {}, {}, f"both refused: {failures[0]}")
    if whole is None or rest is None:
        empty = not trial.batch[1:] and trial.other is None and rest is None
        return Movement(trial, {}, {}, f"{'empty' if empty else 'one'} refused: {failures[0]}")
    names = [n for n in {**whole, **rest}]
    zero = {n: torch.zeros_like(whole[n] if n in whole else rest[n]) for n in names}
    left, right = {**zero, **whole}, {**zero, **rest}
    finite = [all(bool(torch.isfinite(v).all()) for v in side.values()) for side in (left, right)]
    if not all(finite):
        return Movement(trial, {}, {}, "not finite" if any(finite) else "both not finite")
    norms = {n: float((left[n] - right[n]).norm()) for n in names}
    rounding = {n: 2 * unit * float(left[n].norm() + right[n].norm()) for n in names}
    return Movement(trial, norms, rounding)


@dataclass(frozen=True)
class Search:
    """All trials of a step, and the worst by the claim."""

    movements: tuple[Movement, ...]
    stds: Mapping[str, float]
    noise_multiplier: float

    def figure(self, found: Movement) -> float:
        """Its movement over the allowed one."""
        return found.over(self.stds, self.noise_multiplier)

    @property
    def worst(self) -> Movement | None:
        """The trial that moved most."""
        moved = [m for m in self.movements if m.norms]
        return max(moved, key=self.figure, default=None)


def search(
    case: TrainingStep,
    stds: Mapping[str, float],
    *,
    sizes: Sequence[int],
    seed: int,
    own_randomness: bool,
    climbs: int,
    unit: float,
) -> Search:
    """Try neighbouring batches of all kinds, then change the worst ones `climbs` times to move further."""
    listed = trials(case, sizes=sizes, seed=seed, same_places=own_randomness)
    found = [movement(case, trial, unit) for trial in listed]
    result = Search(tuple(found), stds, case.noise_multiplier)
    pool = len(case.records) + len(case.hostile)
    source = random.Random(seed)
    for _ in range(climbs):
        best = result.worst
        if best is None or result.figure(best) > 1.5:
            break
        trial = best.trial
        at = source.randrange(len(trial.batch))
        changed = Entry(source.randrange(pool), trial.batch[at].variant)
        batch = (*trial.batch[:at], changed, *trial.batch[at + 1 :])
        result = replace(
            result, movements=(*result.movements, movement(case, replace(trial, batch=batch), unit))
        )
    return result


def check_sensitivity(case: TrainingStep, found: Search, hint: str = "") -> Finding:
    """One record moves the release by at most one clip norm: by 1 / noise_multiplier deviations of its noise."""
    expected = (
        f"one record moves the release by at most 1 / {case.noise_multiplier:g} deviations of its noise"
    )
    worst = found.worst
    if worst is None:
        told = found.movements[0].trouble if found.movements else "no trial"
        return Finding("sensitivity", UNCHECKED, expected, f"no trial could be run ({told})")
    figure = found.figure(worst)
    told = f"{figure:.4g} times that, in a batch of {len(worst.trial.batch)} ({len(found.movements)} pairs tried)"
    if figure <= 1 + SLACK:
        return Finding("sensitivity", HOLDS, expected, told, figure, "a search: what it missed it missed")
    told = f"{told}; {hint or _reason(found)}"
    again = f"movement(step, {worst.trial!r})"
    confidence = statistical() if hint or case.noise_std is None else "exact"
    return Finding("sensitivity", FAULT, expected, told, figure, confidence, again)


def _reason(found: Search) -> str:
    """What a record that is alone in its batch tells: it is clipped, in groups, or not at all."""
    alone = [m for m in found.movements if m.norms and len(m.trial.batch) == 1]
    worst = max(alone, key=found.figure, default=None)
    if worst is None:
        return "no batch of one record could tell why"
    if found.figure(worst) <= 1 + 10 * SLACK:
        return "not by a record alone: the loss, the clipping or a sum in few bits couples examples"
    single = max(found.figure(replace(worst, norms={n: v})) for n, v in worst.norms.items())
    if single <= 1 + SLACK:
        return (
            "no tensor alone moves too far: groups that are clipped apart need sqrt(groups) times the noise"
        )
    return "by a record alone: it is not clipped to what is claimed, or divided by the size of the draw"


def check_wild(found: Search) -> Finding:
    """A record that is huge, infinite or not a number neither reaches the release nor stops the step."""
    expected = "a finite release whatever one record holds"
    wild = [m for m in found.movements if any(e.variant in WILD for e in m.trial.batch)]
    broken = [m for m in wild if m.trouble == "not finite"]
    refused = [m for m in wild if m.trouble.startswith("one refused")]
    if broken:
        odd = broken[0].trial
        told = f"a release that is not finite after one record that is {odd.batch[odd.odd].variant}: it shows who was there"
        return Finding("hostile records", FAULT, expected, told, None, "exact", f"movement(step, {odd!r})")
    if refused:
        odd = refused[0].trial
        return Finding("hostile records", CAUTION, expected, f"{refused[0].trouble}: whether it stops tells about a record",
                       None, "exact", f"movement(step, {odd!r})")  # fmt: skip
    if not any(m.norms for m in wild):
        return Finding(
            "hostile records", UNCHECKED, expected, "no record has tensors of floats; give hostile=[...]"
        )
    return Finding("hostile records", HOLDS, expected, f"finite in {len(wild)} trials")


def check_empty(case: TrainingStep, found: Search) -> Finding:
    """A draw of nobody is a step like any other."""
    expected = "a step of noise alone where nobody was drawn"
    if case.batch_size:
        return Finding("empty batch", UNCHECKED, expected, "batches of one size: nothing is drawn empty")
    empty = [m for m in found.movements if len(m.trial.batch) == 1 and m.trial.other is None]
    refused = [m for m in empty if m.trouble.startswith("empty refused")]
    if refused:
        told = f"{refused[0].trouble}; Poisson draws can be empty: make the step take [] and release noise"
        return Finding("empty batch", CAUTION, expected, told, None, "exact", "step of make(...) on []")
    if not any(m.norms for m in empty):
        return Finding("empty batch", UNCHECKED, expected, "no batch of one record could be compared")
    return Finding("empty batch", HOLDS, expected, "taken")
