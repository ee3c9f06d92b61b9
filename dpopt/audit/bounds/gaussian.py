# SPDX-License-Identifier: Apache-2.0
"""Bounds from the scores themselves, where these are a constant, or a constant more when included, plus Gaussian noise.

They use all that a score says and no threshold, so they are the sharpest; and they are wrong where the assumption is.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import nctdtr, ndtri

from dpopt.audit.bounds.families import GAUSSIAN
from dpopt.audit.bounds.lower_bound import (
    INDEPENDENT,
    LowerBound,
    check_arguments,
    check_independent,
    check_whole_run,
    epsilon_of,
)
from dpopt.audit.evidence import BoolArray, Evidence

_LARGE = 1e150  # the square of a larger score is none any more
ONE_GAUSSIAN = "each score is a constant, or a constant more when included, plus Gaussian noise"


def full_signal(evidence: Evidence, delta: float, confidence: float = 0.95) -> LowerBound:
    """Bound epsilon from below by how far apart the mean scores are, in units of the noise that the run recorded.

    Args:
        evidence: m scores over the whole run, independent, with their `noise_std`.
        delta: the delta at which epsilon is told.
        confidence: of the bound.

    Raises:
        ValueError: an argument out of range, or scores of which no Gaussian noise is known.

    Guarantees
    ----------
    Above the true epsilon with probability at most 1 - confidence, where the scores are as assumed and their noise is at
    most what was recorded (test_guarantee_no_bound_exceeds_the_truth_too_often): the difference of the two means is
    normal about the true shift, so its limit divided by the deviation is one for mu; a score is post-processing of the
    run, hence delta >= Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu) (Balle, Wang 2018, theorem 8; in the
    spirit of Agrawal et al. 2026, arXiv:2606.12733). Where the scores spread more than the recorded noise, as sums over
    Poisson samples do, the spread that is seen sets the limit. Noise below the recorded is not seen: see `gdp_scores`.
    """
    significance = check_arguments(delta, confidence)
    check_whole_run(evidence, "full_signal")
    mu = shift_in_noise(evidence, significance, "full_signal")
    return LowerBound(
        name="full signal, recorded noise",
        epsilon=epsilon_of(GAUSSIAN, mu, delta),
        delta=delta,
        confidence=confidence,
        assumptions=(
            INDEPENDENT,
            ONE_GAUSSIAN,
            "the deviation of this noise is the one that the run recorded",
        ),
        largest_possible=_unlimited(evidence),
        observed=_seen(evidence, mu),
    )


def gdp_scores(evidence: Evidence, delta: float, confidence: float = 0.95) -> LowerBound:
    """Bound epsilon from below by how far apart the mean scores are, in units of the spread that they show.

    It trusts no record of the noise, and so sees noise that is missing.

    Args:
        evidence: m scores, independent, of one run or of many.
        delta: the delta at which epsilon is told.
        confidence: of the bound.

    Raises:
        ValueError: an argument out of range, or scores that are not independent.

    Guarantees
    ----------
    Above the true epsilon with probability at most 1 - confidence, where the scores are as assumed, with one unknown
    deviation (test_guarantee_no_bound_exceeds_the_truth_too_often): the two-sample t statistic has the noncentral t
    law about mu sqrt(n_in n_out / (n_in + n_out)), which grows with mu; the limit is the least mu that does not make
    it improbable. Gaussian differential privacy (Dong, Roth, Su 2022, arXiv:1905.02383) makes of mu an epsilon.
    """
    significance = check_arguments(delta, confidence)
    check_whole_run(evidence, "gdp_scores")
    check_independent(evidence, "gdp_scores")
    mu = shift_in_spread(evidence, significance)
    return LowerBound(
        name="full signal, spread as seen",
        epsilon=epsilon_of(GAUSSIAN, mu, delta),
        delta=delta,
        confidence=confidence,
        assumptions=(INDEPENDENT, ONE_GAUSSIAN),
        largest_possible=_unlimited(evidence) if evidence.num_records > 2 else 0.0,
        observed=_seen(evidence, mu),
    )


def shift_in_noise(evidence: Evidence, significance: float, name: str) -> float:
    """The lower limit of (mean when included - mean when not) / recorded deviation; 0.0 where there are not both."""
    check_independent(evidence, name)
    noise = evidence.noise_std
    if noise is None:
        raise ValueError(
            f"{name} must know the deviation of Gaussian noise in the scores; got evidence of kind {evidence.kind!r} without "
            "noise_std; use gdp_scores or order_statistics"
        )
    with np.errstate(over="ignore"):
        scores, included = evidence.scores / noise, evidence.included
    if not _usable(evidence) or np.abs(scores).max() > _LARGE:
        return 0.0
    variances = [max(1.0, _variance(scores[side])) / side.sum() for side in (included, ~included)]
    shift = float(scores[included].mean() - scores[~included].mean())
    return max(0.0, shift + float(ndtri(significance)) * math.sqrt(sum(variances)))


def shift_in_spread(evidence: Evidence, significance: float) -> float:
    """The lower limit of (mean when included - mean when not) / common deviation, from the noncentral t law."""
    included = evidence.included
    degrees = evidence.num_records - 2
    if not _usable(evidence) or degrees < 1:
        return 0.0
    scores = evidence.scores / max(1e-300, float(np.abs(evidence.scores).max()))
    sides = (scores[included], scores[~included])
    spread = math.sqrt(sum(float(((side - side.mean()) ** 2).sum()) for side in sides) / degrees)
    shift = float(sides[0].mean() - sides[1].mean())
    if shift <= 0:
        return 0.0
    if spread <= 1e-12 * shift:
        return math.inf
    scale = math.sqrt(len(sides[0]) * len(sides[1]) / len(scores))
    return least_noncentrality(degrees, scale * shift / spread, significance) / scale


def least_noncentrality(degrees: int, statistic: float, significance: float) -> float:
    """The noncentrality at which a t statistic as large as this has the probability `significance`; 0.0 if none."""
    if 1 - nctdtr(degrees, 0.0, statistic) > significance:
        return 0.0
    low, high = 0.0, statistic
    for _ in range(60):
        middle = (low + high) / 2
        chance = 1 - float(nctdtr(degrees, middle, statistic))
        low, high = (middle, high) if chance <= significance else (low, middle)
    return low


def _usable(evidence: Evidence) -> bool:
    both = 0 < evidence.num_included < evidence.num_records
    return both and bool(np.abs(evidence.scores).max() <= _LARGE)


def _variance(scores: np.ndarray) -> float:
    return float(scores.var(ddof=1)) if len(scores) > 1 else 0.0


def _unlimited(evidence: Evidence) -> float:
    return math.inf if _usable(evidence) else 0.0


def _seen(evidence: Evidence, mu: float) -> str:
    included: BoolArray = evidence.included
    if not _usable(evidence):
        return "nothing: finite scores of records on both sides of the coin are needed"
    shift = float(evidence.scores[included].mean() - evidence.scores[~included].mean())
    return f"mean scores {shift:.4g} apart over {evidence.num_records} records; mu at least {mu:.4g}"
