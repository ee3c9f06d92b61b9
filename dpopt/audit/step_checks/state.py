# SPDX-License-Identifier: Apache-2.0
"""What a step publishes besides its gradients: buffers and parameters that move without noise, and the number of records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpopt.audit.step_checks.case import TrainingStep, released, running, seeded, snapshot
from dpopt.audit.step_checks.findings import CAUTION, FAULT, HOLDS, UNCHECKED, Finding

STEPS = 3
"""Steps after which a parameter is looked at: the first step of Adam and its like is of one size, whatever the gradient."""


def _after(
    case: TrainingStep, batch: list[Any], noise_multiplier: float, seed: int, steps: int = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Everything in the model before and after `steps` steps on the same batch."""
    with seeded(seed), running(case.make(case.records, noise_multiplier)) as run:
        before = snapshot(run.model)
        for _ in range(steps):
            run.step(batch)
        return before, snapshot(run.model)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return a is b
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def check_buffers(case: TrainingStep, seed: int) -> Finding:
    """Nothing that `state_dict` publishes depends on the batch unless noise covers it."""
    expected = "no buffer that depends on the batch"
    batch = case.batch
    with seeded(seed), running(case.make(case.records, case.noise_multiplier)) as run:
        parameters = {name for name, _ in run.model.named_parameters(remove_duplicate=False)}
    try:
        one = _after(case, batch, case.noise_multiplier, seed)[1]
        two = _after(case, [*batch[:-1], case.records[-1]], case.noise_multiplier, seed)[1]
    except Exception as error:  # whatever a user's step raises is an outcome
        told = f"{type(error).__name__}: {str(error)[:100]}"
        return Finding("buffers", UNCHECKED, expected, told)
    odd = sorted(n for n in one if n not in parameters and not _same(one[n], two.get(n)))
    if odd:
        told = f"other values in {odd[:4]} after another record: published without noise"
        return Finding(
            "buffers",
            FAULT,
            expected,
            told,
            None,
            "exact",
            "state_dict() after a step on step.batch, and with one replaced",
        )
    count = len([n for n in one if n not in parameters])
    return Finding("buffers", HOLDS, expected, f"{count} buffers, none of them does")


def check_parameters(case: TrainingStep, seed: int) -> Finding:
    """Parameters that a step moves are moved by noisy gradients: not by the same amount with noise and without."""
    expected = "parameters that move by what was released"
    batch = case.batch
    before, noisy = _after(case, batch, case.noise_multiplier, seed, STEPS)
    first, clean = _after(case, batch, 0.0, seed, STEPS)
    with seeded(seed), running(case.make(case.records, 0.0)) as run:
        parameters = dict(run.model.named_parameters())
    moved = [n for n, v in before.items() if n in parameters and not _same(v, noisy[n])]
    bare = [
        n for n in moved
        if not _same(first[n], clean[n]) and bool(((noisy[n] == clean[n]) & (noisy[n] != before[n])).float().mean() > 1e-3)
    ]  # fmt: skip
    if bare:
        told = f"{sorted(bare)[:4]} move by the same amount with noise and without"
        return Finding(
            "parameters",
            FAULT,
            expected,
            told,
            None,
            "exact",
            "state_dict() after one step at noise 0 and at the claimed",
        )
    if not moved:
        return Finding(
            "parameters", UNCHECKED, expected, "the step moves none: only its gradients were looked at"
        )
    return Finding("parameters", HOLDS, expected, f"{len(moved)} tensors move, all with noise")


def check_number_of_records(case: TrainingStep, seed: int) -> Finding:
    """The scale of a release does not depend on how many records there are."""
    expected = "the same release on the same batch, with one record more or fewer in the dataset"
    batch, pool = case.batch, list(case.records)
    others: Sequence[list[Any]] = (pool[:-1], pool + pool[:1], pool + pool[: max(1, len(pool) // 2)])
    here = released(case, batch, noise_multiplier=0.0, seed=seed)
    if not here:
        return Finding("number of records", UNCHECKED, expected, "no gradient after the step")
    for records in others:
        try:
            there = released(case, batch, noise_multiplier=0.0, seed=seed, records=records)
        except Exception as error:  # whatever a user's step raises is an outcome
            told = f"{type(error).__name__} with {len(records)} records in place of {len(pool)}"
            return Finding("number of records", UNCHECKED, expected, told)
        a, b = (float(torch.cat(list(side.values())).norm()) for side in (here, there))
        if a and abs(b / a - 1) > 1e-4:
            told = (
                f"{b / a:.4f} times the release with {len(records)} records in place of {len(pool)}: private only where the "
                "number of records is public"
            )
            return Finding("number of records", CAUTION, expected, told, b / a, "exact",
                           "released(step, step.batch, ..., records=step.records[:-1])")  # fmt: skip
    return Finding("number of records", HOLDS, expected, "the same")
