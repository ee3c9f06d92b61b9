# SPDX-License-Identifier: Apache-2.0
"""The release of one step: from what its examples contributed, through the noise, to the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from clipping import ClippedSum, Contribution, Group
from clipping.contributions import ROUND
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.stage import Stage, Vectors
from dpopt.mechanisms import GaussianMechanism, GroupGaussianMechanism, Mechanism
from dpopt.step import StepSum
from dpopt.tiers import Tier


def scaled(mechanism: Mechanism, factor: float) -> Mechanism:
    """`mechanism` with `factor` times its noise multiplier."""
    if factor == 1.0:
        return mechanism
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"expected finite factors > 0 of the noise; got {factor}; correct the schedule")
    if type(mechanism) is GaussianMechanism or type(mechanism) is GroupGaussianMechanism:
        return replace(mechanism, noise_multiplier=mechanism.noise_multiplier * factor)
    raise ValueError(
        "expected a GaussianMechanism or a GroupGaussianMechanism where the noise varies; got "
        f"{type(mechanism).__name__}; use one of them"
    )


def mechanism_of(estimator: Estimator, mechanism: Mechanism, step: int) -> Mechanism:
    """What releases step number `step`: the given mechanism, sharing its noise as the estimator says."""
    if estimator.allocation is not None:
        if type(mechanism) is not GaussianMechanism:
            raise ValueError(
                "expected a GaussianMechanism with an estimator that shares the budget out itself; got "
                f"{type(mechanism).__name__}; pass GaussianMechanism(noise_multiplier)"
            )
        mechanism = GroupGaussianMechanism(mechanism.noise_multiplier, estimator.allocation)
    return mechanism if estimator.factors is None else scaled(mechanism, estimator.factors(step))


class Released(NamedTuple):
    """The gradient of a step, and the standard deviation of the noise in each vector that was released last."""

    gradient: Vectors
    stds: dict[str, float]


Seen = Callable[[Vectors, Mapping[str, float], float], object]
"""(released vectors, deviations of their noise, divisor of both): told of each release."""


def release(
    stage: Stage,
    step: StepSum,
    mechanism: Mechanism,
    tier: Tier,
    charge: int,
    divisor: float,
    seen: Seen | None = None,
) -> Released:
    """Release a step: once, or `rounds` times. What is released is public, and `seen` may look at it.

    Guarantees
    ----------
    `rounds` releases of the same draw, each with sqrt(rounds) times the noise and chosen from earlier ones, are
    dominated by one release with the noise of `mechanism`: adaptive Gaussian mechanisms compose by the squares of
    their ratios (Dong, Roth, Su 2022, arXiv:1905.02383, corollary 3.3), and the draw is shared
    (test_guarantee_rounds_on_one_draw_cost_one_release).
    """
    mechanism = scaled(mechanism, math.sqrt(stage.rounds))

    def once(number: int, contribution: Contribution) -> Released:
        clipped = step.clipped(contribution)
        if stage.fold is not None:
            clipped = stage.fold(clipped, step.hidden())
        stds = noise_stds(mechanism, clipped, divisor)
        noisy = tier.release(mechanism, _numbered(clipped, number), charge, divisor)
        vectors = {name.removeprefix(_mark(number)): v for name, v in noisy.items()}
        if seen is not None:
            seen(vectors, stds, divisor)
        return Released(vectors, stds)

    found = once(0, stage.contribution)
    for number in range(1, stage.rounds):
        assert stage.again is not None
        found = once(number, stage.again(found.gradient))
    return Released(stage.finish(found.gradient), found.stds)


def noise_stds(mechanism: Mechanism, clipped: ClippedSum, divisor: float) -> dict[str, float]:
    """The standard deviation of the noise in each vector of the release of `clipped`, divided by `divisor`.

    Empty for a mechanism that does not tell.
    """
    tell = getattr(mechanism, "stds", None)
    if tell is None:
        return {}
    sizes = [sum(clipped.total[name].numel() for name in group.names) for group in clipped.groups]
    stds = tell([group.sensitivity for group in clipped.groups], sizes)
    return {n: std / divisor for group, std in zip(clipped.groups, stds, strict=True) for n in group.names}


def _numbered(clipped: ClippedSum, number: int) -> ClippedSum:
    # Each round names its own noise: the same name under one charge is the same stream.
    mark = _mark(number)
    groups = tuple(Group(tuple(mark + n for n in g.names), g.sensitivity) for g in clipped.groups)
    total = {mark + name: value for name, value in clipped.total.items()}
    return ClippedSum(total, clipped.sensitivity, groups)


def _mark(number: int) -> str:
    return f"{number}{ROUND}" if number else ""
