# SPDX-License-Identifier: Apache-2.0
"""A bound from single steps, of which it is known who took part: the noise is measured, the accountant composes it."""

from __future__ import annotations

import math

from dpopt.audit.bounds.families import poisson_steps
from dpopt.audit.bounds.gaussian import ONE_GAUSSIAN, shift_in_spread
from dpopt.audit.bounds.lower_bound import (
    INDEPENDENT,
    LowerBound,
    check_arguments,
    check_independent,
    epsilon_of,
)
from dpopt.audit.evidence import Evidence


def per_step(evidence: Evidence, delta: float, confidence: float = 0.95) -> LowerBound:
    """Bound epsilon from below by the noise measured in single steps, composed over the run by the accountant.

    It sees the noise and the clipping, and is blind to the sampler, whose rate it takes from the record.

    Args:
        evidence: each score is one record's share in one step, and `included` says whether it was in that batch.
        delta: the delta at which epsilon is told.
        confidence: of the bound.

    Raises:
        ValueError: an argument out of range, scores of whole runs, or scores that are not independent.

    Guarantees
    ----------
    Above the true epsilon with probability at most 1 - confidence, where the scores are as assumed and the run's steps
    and rate as recorded (test_guarantee_no_bound_exceeds_the_truth_too_often): the limit of `gdp_scores` for one step
    is one for sensitivity / noise, so the noise multiplier is at most its inverse, and the epsilon of the composition
    (Doroshenko et al. 2022, arXiv:2207.04380) falls with it.
    """
    significance = check_arguments(delta, confidence)
    check_independent(evidence, "per_step")
    if evidence.num_steps is None or evidence.sampling_rate is None:
        raise ValueError(
            "per_step must have scores of single steps, with num_steps and sampling_rate; got scores of whole runs; use "
            "gdp_scores or order_statistics"
        )
    mu = shift_in_spread(evidence, significance)
    family = poisson_steps(evidence.sampling_rate, evidence.num_steps)
    observed = (
        f"{evidence.num_included} participations among {evidence.num_records} scores of single steps; noise multiplier at "
        f"most {math.inf if mu == 0 else 1 / mu:.4g}"
    )
    return LowerBound(
        name="single steps, composed",
        epsilon=epsilon_of(family, mu, delta),
        delta=delta,
        confidence=confidence,
        assumptions=(INDEPENDENT, ONE_GAUSSIAN, family.assumption),
        largest_possible=math.inf if 0 < evidence.num_included < evidence.num_records > 2 else 0.0,
        observed=observed,
    )
