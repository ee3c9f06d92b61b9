# SPDX-License-Identifier: Apache-2.0
"""Which mechanism releases a step: the given one, sharing its noise as the estimator says."""

from __future__ import annotations

import math
from dataclasses import replace

from dpopt.estimators.estimator import Estimator
from dpopt.mechanisms import GaussianMechanism, GroupGaussianMechanism, Mechanism


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
