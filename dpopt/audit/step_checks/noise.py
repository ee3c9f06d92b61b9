# SPDX-License-Identifier: Apache-2.0
"""The noise of a step, as it comes out: everywhere, of the claimed scale, normal, and the same whatever the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from dpopt.audit.step_checks.case import (
    TrainingStep,
    gradients,
    released,
    resolution,
    restore,
    running,
    seeded,
    snapshot,
)
from dpopt.audit.step_checks.findings import CAUTION, FAULT, HOLDS, LEVEL, UNCHECKED, Finding, statistical

COORDINATES = 20_000
"""At most so many of each tensor are looked at, evenly spread."""


@dataclass(frozen=True)
class NoiseSample:
    """Noise of `steps` steps by tensor, each (steps, coordinates): what was released less what is released without."""

    tensors: dict[str, np.ndarray]
    missing: tuple[str, ...]
    centred: bool
    seed: int
    resolution: float = 0.0
    """The machine epsilon of what was released."""
    largest: float = 0.0
    """The largest number of the release without noise."""

    @property
    def size(self) -> int:
        """All numbers together."""
        return sum(x.size for x in self.tensors.values())

    def scale(self, name: str) -> float:
        """The standard deviation of the noise in one tensor."""
        return math.sqrt(float(np.square(self.tensors[name]).mean()))

    def most(self, name: str, level: float) -> float:
        """The most that the true standard deviation can be, at the level."""
        n = self.tensors[name].size
        return self.scale(name) * math.sqrt(n / stats.chi2.ppf(level, n))

    def joined(self) -> np.ndarray:
        """All tensors side by side, each over its own scale: (steps, coordinates)."""
        return np.concatenate([x / (self.scale(n) or 1.0) for n, x in self.tensors.items()], axis=1)


def sample_noise(
    case: TrainingStep, size: int, steps: int, seed: int, *, own_randomness: bool
) -> NoiseSample:
    """Run `steps` noisy steps on one batch of `size` records; the model is put back before each.

    Where the step has `own_randomness` (dropout) its noise-free release cannot be taken off exactly; it is left in.
    """
    batch = (
        case.batch if size == case.batch_size else [case.records[i % len(case.records)] for i in range(size)]
    )
    clean = {} if own_randomness else released(case, batch, noise_multiplier=0.0, seed=seed)
    rows: dict[str, list[np.ndarray]] = {}
    seen: dict[str, int] = {}
    with seeded(seed), running(case.make(case.records, case.noise_multiplier)) as run:
        state = snapshot(run.model)
        names = [name for name, p in run.model.named_parameters() if p.requires_grad]
        for _ in range(steps):
            restore(run.model, state)
            run.step(batch)
            for name, value in gradients(run.model).items():
                less = value - clean[name] if name in clean else value
                apart = less[:: math.ceil(less.numel() / COORDINATES)].numpy()
                rows.setdefault(name, []).append(apart)
                seen[name] = seen.get(name, 0) + 1
        unit = resolution(run.model)
    largest = max((float(x.abs().max()) for x in clean.values()), default=0.0)
    whole = {name: np.stack(x) for name, x in rows.items() if seen[name] == steps}
    missing = tuple(name for name in names if name not in whole)
    return NoiseSample(whole, missing, not own_randomness, seed, unit, largest)


def check_presence(sample: NoiseSample) -> Finding:
    """Every coordinate of every trainable tensor has noise in every step."""
    bare = {n: float((x == 0).mean()) for n, x in sample.tensors.items()}
    # Noise below the resolution of the number that it is added to is rounded away: in sixteen bits that is seen.
    some = {n: 1e-3 + 2 * sample.resolution * (1 + sample.largest / (sample.scale(n) or 1.0)) for n in bare}
    bad = sorted(n for n, share in bare.items() if share > some[n] and sample.centred) + list(sample.missing)
    expected = "noise in every coordinate of every released tensor, in every step"
    if not sample.tensors:
        seen = "no gradient after the step: call zero_grad() at its beginning, not at its end"
        return Finding("noise present", UNCHECKED, expected, seen)
    if any(not np.isfinite(x).all() for x in sample.tensors.values()):
        return Finding("noise present", FAULT, expected, "released gradients that are not finite")
    if not bad:
        told = f"noise in {len(sample.tensors)} tensors" + (
            "" if sample.centred else " (seen with the signal)"
        )
        return Finding("noise present", HOLDS, expected, told)
    told = ", ".join(
        f"{n} ({bare[n]:.0%} of it bare)" if n in bare else f"{n} (no gradient)" for n in bad[:4]
    )
    verdict = FAULT if any(n in bare for n in bad) else CAUTION
    return Finding("noise present", verdict, expected, f"none in {told}", max(bare.values(), default=None),
                   reproduce=f"sample_noise(step, 4, 64, {sample.seed}, own_randomness=False)")  # fmt: skip


def check_scale(case: TrainingStep, sample: NoiseSample) -> Finding:
    """The standard deviation of each tensor's noise is the claimed one; less is a fault, more a caution."""
    std = case.noise_std
    if std is None or not sample.tensors:
        seen = "no clip_norm and expected_batch_size to compare with; the joint check covers it"
        return Finding("noise scale", UNCHECKED, "noise_multiplier * clip_norm / expected_batch_size", seen)
    level, low, high = LEVEL / (2 * len(sample.tensors) + 2), [], []
    pooled = sum(float(np.square(x).sum()) for x in sample.tensors.values())
    groups = [("all tensors", pooled, sample.size)]
    groups += [(n, float(np.square(x).sum()), x.size) for n, x in sample.tensors.items()]
    for name, energy, n in groups:
        ratio = math.sqrt(energy / n) / std
        statistic = energy / std**2
        low += [(ratio, name)] if stats.chi2.cdf(statistic, n) < level else []
        high += [(ratio, name)] if stats.chi2.sf(statistic, n) < level and sample.centred else []
    expected = f"standard deviation {std:.6g} in every tensor"
    ratio = math.sqrt(pooled / sample.size) / std
    smallest = 1 - stats.norm.isf(level) / math.sqrt(2 * sample.size)
    sure = f"{statistical()}; {sample.size} numbers, would see {smallest:.3f} of it in all tensors"
    if low:
        told = f"{low[0][0]:.4f} times that in {low[0][1]}"
        return Finding("noise scale", FAULT, expected, told, low[0][0], sure, _again(sample))
    if high:
        told = f"{high[0][0]:.4f} times that in {high[0][1]}: more than is paid for"
        return Finding("noise scale", CAUTION, expected, told, high[0][0], sure, _again(sample))
    return Finding("noise scale", HOLDS, expected, f"{ratio:.4f} times that", ratio, sure)


def _again(sample: NoiseSample) -> str:
    return f"sample_noise(step, 4, 64, {sample.seed}, own_randomness=False)"


def check_shape(sample: NoiseSample) -> Finding:
    """The noise is normal: Kolmogorov and Smirnov's distance, and the fourth moment."""
    values = sample.joined().ravel() if sample.tensors else np.zeros(0)
    if values.size < 1000 or not np.isfinite(values).all() or not np.square(values).sum():
        return Finding("noise shape", UNCHECKED, "normal noise", "fewer than 1000 finite numbers of it")
    # Scales were estimated from the same numbers, which makes this check milder than its level, never stricter.
    test = stats.kstest(values[: 1 << 18], "norm")
    kurtosis = float((values**4).mean() / (values**2).mean() ** 2 - 3)
    beyond = abs(kurtosis) / math.sqrt(24 / values.size)
    odd = test.pvalue < LEVEL / 2 or (sample.centred and beyond > stats.norm.isf(LEVEL / 4) * 1.2)
    seen = f"distance {test.statistic:.4f} from it, excess kurtosis {kurtosis:+.3f}"
    return Finding("noise shape", FAULT if odd else HOLDS, "normal noise", seen, float(test.statistic),
                   statistical(), _again(sample) if odd else "")  # fmt: skip


def check_steadiness(sample: NoiseSample) -> Finding:
    """No step has less noise than the others."""
    values = sample.joined() if sample.tensors else np.zeros((0, 0))
    steps, width = values.shape
    expected = "as much noise in every step"
    if steps < 2 or not np.isfinite(values).all() or not np.square(values).sum():
        return Finding("noise steady", UNCHECKED, expected, "no noise to compare")
    energy = np.square(values).sum(1) / np.square(values).mean()
    least, most = int(energy.argmin()), int(energy.argmax())
    level = LEVEL / (2 * steps)
    odd = stats.chi2.cdf(energy[least], width) < level or stats.chi2.sf(energy[most], width) < level
    seen = f"{math.sqrt(energy[least] / width):.3f} (step {least}) to {math.sqrt(energy[most] / width):.3f} times the mean"
    verdict = HOLDS if not odd else FAULT
    return Finding("noise steady", verdict, expected, seen, math.sqrt(energy[least] / width), statistical(),
                   _again(sample) if odd else "")  # fmt: skip


def check_batches(case: TrainingStep, sample: NoiseSample, others: dict[int, NoiseSample]) -> Finding:
    """The noise does not depend on the batch: the same scale for one record, for many, and for none."""
    expected = "the same noise whatever the drawn batch"
    level, worst = LEVEL / max(1, 2 * len(others)), (1.0, 0, False)
    for size, other in others.items():
        names = [n for n in sample.tensors if n in other.tensors]
        if not names:
            continue
        a = float(
            np.mean(
                [np.square(other.tensors[n]).sum() / sample.scale(n) ** 2 for n in names if sample.scale(n)]
                or [0]
            )
        )
        count = float(np.mean([other.tensors[n].size for n in names]))
        reference = float(np.mean([sample.tensors[n].size for n in names]))
        ratio = a / count if count else 1.0
        odd = stats.f.cdf(ratio, count, reference) < level or stats.f.sf(ratio, count, reference) < level
        if odd and abs(ratio - 1) >= abs(worst[0] - 1):
            worst = (ratio, size, True)
    if not others:
        return Finding("noise and batch", UNCHECKED, expected, "no other batch could be run")
    if not worst[2]:
        sizes = ", ".join(map(str, others))
        return Finding(
            "noise and batch", HOLDS, expected, f"the same at batches of {sizes}", 1.0, statistical()
        )
    told = f"{math.sqrt(worst[0]):.3f} times the scale at a batch of {worst[1]}: the size of the draw shows"
    return Finding("noise and batch", FAULT, expected, told, math.sqrt(worst[0]), statistical(),
                   f"sample_noise(step, {worst[1]}, 64, {sample.seed}, own_randomness=False)")  # fmt: skip


def finite(sample: NoiseSample) -> bool:
    """Whether there is noise to speak of."""
    return bool(sample.tensors) and all(np.isfinite(x).all() for x in sample.tensors.values()) and any(
        sample.scale(n) > 0 for n in sample.tensors
    )  # fmt: skip


def common_scale(sample: NoiseSample, level: float = LEVEL) -> dict[str, float]:
    """For each tensor the most that its noise's standard deviation can be: of all together, where they agree."""
    scales = {n: sample.scale(n) for n in sample.tensors}
    total = sum(float(np.square(x).sum()) for x in sample.tensors.values())
    pooled = math.sqrt(total / sample.size)
    alike = all(
        stats.chi2.cdf(scales[n] ** 2 / pooled**2 * x.size, x.size) > level
        and stats.chi2.sf(scales[n] ** 2 / pooled**2 * x.size, x.size) > level
        for n, x in sample.tensors.items()
    )
    if alike:
        most = pooled * math.sqrt(sample.size / stats.chi2.ppf(level, sample.size))
        return dict.fromkeys(sample.tensors, most)
    return {n: sample.most(n, level / len(scales)) for n in scales}


def has_own_randomness(case: TrainingStep, seed: int) -> bool:
    """Whether a step without noise still depends on the seed that it runs from, as dropout does.

    Raises:
        ValueError: two builds from one seed release different things.
    """
    batch = case.batch
    found = []
    for inner in (None, None, seed + 1):
        with seeded(seed), running(case.make(case.records, 0.0)) as run:
            if inner is not None:
                torch.manual_seed(inner)
            run.step(batch)
            found.append(gradients(run.model))
    same = all(torch.equal(found[0][n], found[1][n]) for n in found[0] if n in found[1])
    if not same or found[0].keys() != found[1].keys():
        raise ValueError(
            "expected make(records, 0.0) and a step to do the same twice from one seed; got two results; build the model "
            "inside make, and let nothing but the noise come from randomness that cannot be seeded"
        )
    return any(not torch.equal(found[0][n], found[2][n]) for n in found[0] if n in found[2])
