# SPDX-License-Identifier: Apache-2.0
"""All checks of one step, in order: noise first, for the sensitivity is measured in its deviations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dpopt.audit.step_checks import independence, noise, sampler, sensitivity, state
from dpopt.audit.step_checks.case import TrainingStep
from dpopt.audit.step_checks.findings import HOLDS, UNCHECKED, Finding, StepReport

SIZES = (1, 2, 3, 8, 16, 64)
STEPS = 96
BATCH = 4
"""Records in the batch on which noise is looked at."""
CLIMBS = 40
CHECKS = ("noise", "sensitivity", "independence", "state", "sampler")


def check_step(
    case: TrainingStep,
    *,
    name: str = "step",
    seed: int = 0,
    sizes: Sequence[int] = SIZES,
    steps: int = STEPS,
    climbs: int = CLIMBS,
    checks: Sequence[str] = CHECKS,
) -> StepReport:
    """Look for privacy faults in a training step, by running it.

    Args:
        case: the step and its claim.
        name: how the report calls it.
        seed: from which all of the checker's randomness comes; the same seed finds the same.
        sizes: of the batches on which one record is removed or replaced.
        steps: noisy steps to look at, at least 20; four times as many draws of a loader.
        climbs: changes of the worst batch, to find a worse one.
        checks: which of "noise", "sensitivity", "independence", "state" and "sampler" to run.

    Returns:
        All findings; `.faults` of a step whose claim holds is empty, with probability above 99.9 %.

    Guarantees
    ----------
    Each statistical check of a step whose noise and draws have the claimed law raises an alarm with probability at most
    1e-5, all of them together below 1e-3 (test_guarantee_a_correct_step_is_not_accused). A fault in "sensitivity" is a
    pair of neighbouring batches that anybody can replay: no statistics but the scale of the noise are in it.
    """
    if steps < 20 or not set(checks) <= set(CHECKS):
        raise ValueError(
            f"expected at least 20 steps and checks out of {CHECKS}; got {steps} and {tuple(checks)}; correct them"
        )
    return StepReport(name, tuple(_findings(case, seed, sizes, steps, climbs, checks)))


def _findings(
    case: TrainingStep, seed: int, sizes: Sequence[int], steps: int, climbs: int, checks: Sequence[str]
) -> Iterator[Finding]:
    own = noise.has_own_randomness(case, seed)
    size = case.batch_size or (1 if own else BATCH)
    found = noise.sample_noise(case, size, steps, seed + 1, own_randomness=own)
    yield noise.check_presence(found)
    good = noise.finite(found)
    if "noise" in checks:
        yield noise.check_scale(case, found)
        yield noise.check_shape(found)
        yield noise.check_steadiness(found)
        yield noise.check_batches(
            case, found, {} if own or not good or case.batch_size else _other_batches(case, seed)
        )
    if "sensitivity" in checks:
        yield from _sensitivity(case, found, good, seed, sizes, climbs, own)
    if "independence" in checks:
        yield independence.check_steps(found)
        yield independence.check_tensors(found)
        yield from independence.check_runs(case, seed + 3)
        yield independence.check_workers(case, seed + 4)
    if "state" in checks:
        yield state.check_buffers(case, seed + 5)
        yield state.check_parameters(case, seed + 6)
        yield state.check_number_of_records(case, seed + 7)
    if "sampler" in checks:
        yield from sampler.check_sampler(case, seed + 8, 4 * steps)


def _other_batches(case: TrainingStep, seed: int) -> dict[int, noise.NoiseSample]:
    taken = {}
    for size in (0, 1, 32):
        try:
            sample = noise.sample_noise(case, size, 24, seed + 10 + size, own_randomness=False)
        except Exception:
            continue
        if sample.tensors:
            taken[size] = sample
    return taken


def _sensitivity(
    case: TrainingStep,
    found: noise.NoiseSample,
    good: bool,
    seed: int,
    sizes: Sequence[int],
    climbs: int,
    own: bool,
) -> Iterator[Finding]:
    claimed = case.noise_std
    stds = noise.common_scale(found) if good else {}
    # Tensors without noise, or with infinite sensitivity, are spoken of by "noise present".
    stds = {n: s for n, s in stds.items() if s > 0}
    trials = sensitivity.search(
        case,
        stds if claimed is None else dict.fromkeys(found.tensors, claimed),
        sizes=(case.batch_size,) if case.batch_size else sizes, seed=seed + 2, own_randomness=own, climbs=climbs, unit=found.resolution or 1e-7,
    )  # fmt: skip
    if not trials.stds:
        expected = "noise to measure movements by"
        yield Finding(
            "sensitivity", UNCHECKED, expected, "none; give clip_norm and expected_batch_size to go without"
        )
    else:
        first = sensitivity.check_sensitivity(case, trials)
        yield first
        if claimed is not None and stds:
            hint = "the clipping holds, the noise is too small" if first.verdict == HOLDS else ""
            joint = sensitivity.check_sensitivity(case, replace(trials, stds=stds), hint)
            yield replace(joint, check="sensitivity to noise")
    yield sensitivity.check_wild(trials)
    yield sensitivity.check_empty(case, trials)
