# SPDX-License-Identifier: Apache-2.0
"""Noise that is drawn anew each time: for each step, each tensor, each run and each rank."""

from __future__ import annotations

import math

import numpy as np
from scipy import special, stats

from dpopt.audit.step_checks.case import TrainingStep, gradients, released, restore, running, seeded, snapshot
from dpopt.audit.step_checks.findings import CAUTION, FAULT, HOLDS, LEVEL, UNCHECKED, Finding, statistical
from dpopt.audit.step_checks.noise import NoiseSample

_REUSED = 0.98
"""Correlations above this are the same noise."""


def _judged(check: str, expected: str, z: float, tests: int, told: str, reproduce: str) -> Finding:
    limit = float(stats.norm.isf(LEVEL / (2 * max(1, tests))))
    verdict = FAULT if abs(z) > limit else HOLDS
    seen = f"{told}; {z:+.1f} standard deviations, at most {limit:.1f} by chance"
    return Finding(
        check, verdict, expected, seen, abs(z) / limit, statistical(), reproduce if verdict == FAULT else ""
    )


def check_steps(sample: NoiseSample) -> Finding:
    """No two steps share noise: the correlations of all pairs, the largest and their sum."""
    expected = "independent noise in every step"
    values = sample.joined() if sample.tensors else np.zeros((0, 0))
    steps, width = values.shape
    if steps < 2 or width < 8 or not np.square(values).sum() or not sample.centred:
        told = "the step's own randomness hides it" if not sample.centred else "too little noise to compare"
        return Finding("steps independent", UNCHECKED, expected, told)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    cosines = (values / np.where(norms == 0, 1, norms)) @ (values / np.where(norms == 0, 1, norms)).T
    upper = cosines[np.triu_indices(steps, 1)]
    # For independent normal rows the cosine c has (1 + c) / 2 ~ Beta((width - 1) / 2, (width - 1) / 2), exactly.
    largest = float(np.abs(upper).max())
    chance = 2 * stats.beta.sf((1 + largest) / 2, (width - 1) / 2, (width - 1) / 2)
    z_largest = (
        float(stats.norm.isf(max(chance * upper.size / 2, 1e-300))) if chance * upper.size < 1 else 0.0
    )
    z_sum = float(upper.sum() * math.sqrt(width) / math.sqrt(upper.size))
    lagged = float(np.diagonal(cosines, 1).sum() * math.sqrt(width) / math.sqrt(steps - 1))
    z = max((z_largest, z_sum, lagged), key=abs)
    told = f"largest correlation of two steps {largest:.3f}" + (
        " (the same noise)" if largest > _REUSED else ""
    )
    return _judged(
        "steps independent",
        expected,
        z,
        4,
        told,
        f"sample_noise(step, 4, {steps}, {sample.seed}, own_randomness=False)",
    )


def check_tensors(sample: NoiseSample) -> Finding:
    """No two tensors share noise, nor do neighbouring coordinates of one."""
    expected = "independent noise in every tensor and coordinate"
    if len(sample.tensors) < 1 or not sample.centred:
        return Finding(
            "tensors independent",
            UNCHECKED,
            expected,
            "the step's own randomness hides it" if sample.tensors else "no noise",
        )
    scaled = {n: x / (sample.scale(n) or 1.0) for n, x in sample.tensors.items()}
    names = list(scaled)
    found = []
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            m = min(scaled[name].shape[1], scaled[other].shape[1])
            found += _pair(scaled[name][:, :m], scaled[other][:, :m], f"{name} and {other}")
        for lag in {1, scaled[name].shape[1] // 2}:
            if 0 < lag < scaled[name].shape[1]:
                found += _pair(scaled[name][:, :-lag], scaled[name][:, lag:], f"coordinates of {name}")
    worst, where = max(found, key=lambda pair: abs(pair[0]), default=(0.0, names[0]))
    tests = len(found)
    told = f"most correlated: {where}"
    return _judged(
        "tensors independent",
        expected,
        worst,
        tests,
        told,
        f"sample_noise(step, 4, 64, {sample.seed}, own_randomness=False)",
    )


def _pair(a: np.ndarray, b: np.ndarray, where: str) -> list[tuple[float, str]]:
    """Of the numbers, and of their sizes: noise made of the same radii at other angles has other signs."""
    sizes = [math.sqrt(12) * (special.erf(np.abs(x) / math.sqrt(2)) - 0.5) for x in (a, b)]
    return [(_together(a, b), where), (_together(sizes[0], sizes[1]), f"sizes in {where}")]


def _together(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / math.sqrt(a.size))


def check_runs(case: TrainingStep, seed: int) -> tuple[Finding, Finding]:
    """Whether another run has the same noise: from another seed (a fault), and from the same (a resumed script)."""
    batch = case.batch
    clean = [released(case, batch, noise_multiplier=0.0, seed=s) for s in (seed, seed + 1)]
    noisy = [
        released(case, batch, noise_multiplier=case.noise_multiplier, seed=s) for s in (seed, seed, seed + 1)
    ]
    first, again = ({n: noisy[k][n] - clean[0][n] for n in noisy[k] if n in clean[0]} for k in (0, 1))
    other = {n: noisy[2][n] - clean[1][n] for n in noisy[2] if n in clean[1]}
    reproduce = f"released(step, step.batch, noise_multiplier=step.noise_multiplier, seed={seed})"
    fresh = _same(
        "runs independent", FAULT, "other noise in a run from another seed", first, other, reproduce
    )
    expected = "other noise after a restart of the script, whatever its seed"
    resumed = _same("restart", CAUTION, expected, first, again, reproduce)
    return fresh, resumed


def _same(check: str, verdict: str, expected: str, a: dict, b: dict, reproduce: str) -> Finding:
    names = [n for n in a if n in b]
    left = np.concatenate([a[n].numpy() for n in names]) if names else np.zeros(0)
    right = np.concatenate([b[n].numpy() for n in names]) if names else np.zeros(0)
    size = np.linalg.norm(left) * np.linalg.norm(right)
    if left.size < 8 or not size or not np.isfinite(size):
        return Finding(check, UNCHECKED, expected, "no noise to compare")
    cosine = float(left @ right / size)
    chance = 2 * stats.beta.sf((1 + abs(cosine)) / 2, (left.size - 1) / 2, (left.size - 1) / 2)
    if chance < LEVEL:
        told = "the same noise" if cosine > _REUSED else f"noise with correlation {cosine:.3f}"
        if check == "restart" and cosine > _REUSED:
            told = "the same noise: two runs from one seed on different batches give away the difference of their sums"
        return Finding(check, verdict, expected, told, cosine, statistical(), reproduce)
    return Finding(check, HOLDS, expected, f"correlation {cosine:+.3f}", abs(cosine), statistical())


def check_workers(case: TrainingStep, seed: int, rounds: int = 64) -> Finding:
    """Ranks or clients whose releases are all published do not share noise."""
    expected = "independent noise in every rank"
    if case.workers is None:
        return Finding("ranks independent", UNCHECKED, expected, "no workers given")
    rows: list[list[np.ndarray]] = []
    batch = case.batch
    with seeded(seed):
        runs = [tuple(made) for made in case.workers(case.noise_multiplier)]
        for made in runs:
            with running(made) as run:
                seen, state = [], snapshot(run.model)
                for _ in range(rounds):
                    restore(run.model, state)
                    run.step(batch)
                    seen.append(np.concatenate([g.numpy() for g in gradients(run.model).values()]))
                rows.append(seen)
    worst, tests = 0.0, 0
    stacked = [np.stack(seen) for seen in rows]
    stacked = [(x - x.mean(0)) / (x.std() or 1.0) for x in stacked]
    for i, left in enumerate(stacked):
        for right in stacked[i + 1 :]:
            tests += 1
            worst = max(worst, _together(left, right), key=abs)
    return _judged(
        "ranks independent",
        expected,
        worst,
        tests,
        f"{len(runs)} ranks",
        "step.workers(step.noise_multiplier)",
    )
