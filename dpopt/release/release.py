# SPDX-License-Identifier: Apache-2.0
"""The release of one step: from what its examples contributed, through the noise, to the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from clipping import ClippedSum, Contribution, Group
from clipping.contributions.contribution import ROUND
from clipping.step.step_sum import StepSum
from dpopt.estimators.stage import Stage, Vectors
from dpopt.estimators.step_mechanism import scaled
from dpopt.mechanisms import Mechanism
from dpopt.release.randomness_tiers import Tier


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
    if stage.rounds > 1:
        mechanism = scaled(mechanism, math.sqrt(stage.rounds))

    def once(number: int, contribution: Contribution) -> Released:
        clipped = step.clipped(contribution)
        if stage.fold is not None:
            clipped = stage.fold(clipped, step.hidden())
        stds = noise_stds(mechanism, clipped, divisor)
        vectors = tier.release(mechanism, _numbered(clipped, number) if number else clipped, charge, divisor)
        if number:
            vectors = {name.removeprefix(_mark(number)): v for name, v in vectors.items()}
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
    return f"{number}{ROUND}"
