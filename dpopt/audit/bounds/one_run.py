# SPDX-License-Identifier: Apache-2.0
"""Bounds from the guesses of one run that hold however the records disturb one another.

The k most and the k least suspicious records are guessed; k is a share of m fixed in advance, never chosen by results.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.special import bdtrc
from scipy.stats import binom

from dpopt.audit.bounds.families import GAUSSIAN, Family
from dpopt.audit.bounds.lower_bound import (
    FAIR,
    LowerBound,
    check_arguments,
    check_whole_run,
    epsilon_of,
    largest_refuted,
    num_right,
)
from dpopt.audit.evidence import Evidence

_MOST_STRENGTH = 50.0  # far above what any number of guesses refutes
SHARE = 0.05
"""The share of the records that is guessed at either end."""


def num_guesses(num_records: int, share: float) -> int:
    """The number of guesses at either end: `share` of m, at least one where m >= 2."""
    if isinstance(share, bool) or not (isinstance(share, int | float) and 0 < share <= 0.5):
        raise ValueError(f"share must be in (0, 0.5]; got {share!r}; pass e.g. share=0.05")
    return min(max(1, round(share * num_records)), num_records // 2)


def steinke(evidence: Evidence, delta: float, confidence: float = 0.95, share: float = SHARE) -> LowerBound:
    """Bound epsilon from below by counting right guesses in one run; it assumes nothing but the coins.

    Args:
        evidence: m records, scored over the whole run.
        delta: the delta at which epsilon is bounded.
        confidence: of the bound.
        share: of the records guessed at either end; fix it before looking at the coins.

    Raises:
        ValueError: an argument out of range, or scores of single steps.

    Guarantees
    ----------
    Above the true epsilon with probability at most 1 - confidence, for every (epsilon, delta)-differentially private
    training (test_guarantee_no_bound_exceeds_the_truth_too_often). Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846,
    theorem 5.2): given the output and the coins before, each of the r guesses is right with probability at most
    e^epsilon / (1 + e^epsilon), but for events whose price is the delta term; so the number right is above v with
    probability at most P[Bin >= v] + 2 m delta max_i (P[Bin >= v - i] - P[Bin >= v]) / i.
    """
    significance = check_arguments(delta, confidence)
    check_whole_run(evidence, "steinke")
    m, k = evidence.num_records, num_guesses(evidence.num_records, share)
    right = num_right(evidence, k, k)

    def bound(v: int) -> float:
        return _steinke_bound(m, 2 * k, v, delta, significance)

    return LowerBound(
        name="one run, guesses",
        epsilon=bound(right),
        delta=delta,
        confidence=confidence,
        assumptions=(FAIR,),
        largest_possible=bound(2 * k),
        observed=f"{right} of {2 * k} guesses right, out of {m} records",
    )


@lru_cache(maxsize=4096)
def _steinke_bound(m: int, guesses: int, right: int, delta: float, significance: float) -> float:
    return largest_refuted(lambda epsilon: steinke_p_value(m, guesses, right, epsilon, delta) <= significance)


def steinke_p_value(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The probability of so many right guesses is at most this, of an (epsilon, delta)-private training."""
    if right <= 0 or guesses == 0:
        return 1.0
    chance = 1 / (1 + math.exp(-min(epsilon, 700.0)))
    exact = float(bdtrc(right - 1, guesses, chance))
    if delta == 0:
        return exact
    masses = _masses(guesses, chance)[right - 1 :: -1][:right]  # of right - 1, right - 2, ..., 0
    worst = float((np.cumsum(masses) / np.arange(1, right + 1)).max())
    return min(1.0, exact + 2 * m * delta * worst)


def _masses(guesses: int, chance: float) -> np.ndarray:
    return binom.pmf(np.arange(guesses + 1), guesses, chance)


def fdp_one_run(
    evidence: Evidence,
    delta: float,
    confidence: float = 0.95,
    share: float = SHARE,
    family: Family = GAUSSIAN,
) -> LowerBound:
    """Bound epsilon from below by counting right guesses in one run, against a whole trade-off curve.

    Args:
        evidence: m records, scored over the whole run.
        delta: the delta at which epsilon is told.
        confidence: of the bound.
        share: of the records guessed at either end; fix it before looking at the coins.
        family: the mechanisms tested against, `GAUSSIAN` or `any_mechanism(delta)`.

    Raises:
        ValueError: an argument out of range, scores of single steps, or a family whose trade-off curve is not known.

    Guarantees
    ----------
    Above the true epsilon with probability at most 1 - confidence, for every training whose trade-off curve is one of
    the family's (test_guarantee_no_bound_exceeds_the_truth_too_often), however the records' scores hang together
    (test_guarantee_one_run_bounds_hold_when_scores_hang_together). Mahloujifar, Melis, Chaudhuri 2024
    (arXiv:2410.22235). Let r_i and h_i be the probabilities that a record chosen evenly is guessed, rightly or
    wrongly, while at least i guesses are right. Turning one coin turns its right guess into a wrong one and leaves the
    others, so r_(i+1) <= power(h_i) (record by record, then by Jensen, as the power is concave); and
    r_i - r_(i+1) : h_i - h_(i+1) = i : (guesses - i). Were P[right >= v] at least 1 - confidence, these would force
    r_0 + h_0 above guesses / m, which it is.
    """
    significance = check_arguments(delta, confidence)
    check_whole_run(evidence, "fdp_one_run")
    if family.power is None:
        raise ValueError(
            f"family must have a known trade-off curve; got {family.name!r}; use GAUSSIAN or any_mechanism(delta)"
        )
    m, k = evidence.num_records, num_guesses(evidence.num_records, share)
    right = num_right(evidence, k, k)

    def bound(v: int) -> float:
        return epsilon_of(family, _fdp_bound(m, 2 * k, v, significance, family), delta)

    return LowerBound(
        name="one run, trade-off curve",
        epsilon=bound(right),
        delta=delta,
        confidence=confidence,
        assumptions=(FAIR, family.assumption),
        largest_possible=bound(2 * k),
        observed=f"{right} of {2 * k} guesses right, out of {m} records",
    )


@lru_cache(maxsize=4096)
def _fdp_bound(m: int, guesses: int, right: int, significance: float, family: Family) -> float:
    return largest_refuted(
        lambda strength: fdp_refuted(m, guesses, right, strength, significance, family), _MOST_STRENGTH
    )


def fdp_refuted(
    m: int, guesses: int, right: int, strength: float, significance: float, family: Family = GAUSSIAN
) -> bool:
    """Whether a mechanism of this strength has so many right guesses with a probability below the significance."""
    if right <= 0 or guesses == 0 or family.power is None:
        return False
    rightly, wrongly = significance * right / m, significance * (guesses - right) / m
    for i in range(right - 1, -1, -1):
        least = max(wrongly, _least_rate(family, strength, rightly))
        rightly = min(1.0, rightly + i * (least - wrongly) / (guesses - i))
        wrongly = least
        if rightly + wrongly > guesses / m:  # both only grow
            return True
    return False


def _least_rate(family: Family, strength: float, power: float) -> float:
    """The least false positive rate with this power: the power seen from the other side, which is symmetric."""
    assert family.power is not None
    return 1 - family.power(strength, 1 - power)
