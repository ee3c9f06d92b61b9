# SPDX-License-Identifier: Apache-2.0
"""Bounds from scores that are independent given the coins: records with noise to themselves, or one of each of many runs.

Independence is worth much: a training that treats its records together may, with a small probability, be bad for all
of them at once, and a bound that allows for this must stay low.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtri

from dpopt.audit.bounds.families import GAUSSIAN, Family
from dpopt.audit.bounds.lower_bound import (
    FAIR,
    INDEPENDENT,
    LowerBound,
    binomial_lower,
    binomial_upper,
    check_arguments,
    check_independent,
    check_whole_run,
    epsilon_of,
    num_right,
    strength_of_advantage,
)
from dpopt.audit.evidence import Evidence


def order_statistics(
    evidence: Evidence, delta: float, confidence: float = 0.95, family: Family = GAUSSIAN
) -> LowerBound:
    """Bound epsilon from below by guessing every record: the half with the larger scores took part, the other not.

    Only the order of the scores counts, so no law of them is assumed.

    Args:
        evidence: m records, scored over the whole run, independent given the coins.
        delta: the delta at which epsilon is told.
        confidence: of the bound.
        family: the mechanisms tested against.

    Raises:
        ValueError: an argument out of range, scores of single steps, or scores that are not independent.

    Guarantees
    ----------
    Above the true epsilon with probability at most 1 - confidence, for every mechanism of the family and scores that are
    independent given the coins (test_guarantee_no_bound_exceeds_the_truth_too_often). After Xiang et al. 2025
    (arXiv:2509.08704), who guess without abstention; the proof here: by Blackwell's theorem each score is a function of
    a draw x of the family's worst pair and of noise of its own. Given all x and noises the coins are independent, each
    known with probability at most (1 + |tanh(loss(x) / 2)|) / 2, and the guesses, which see scores only, are fixed.
    So the number right is stochastically at most a sum of independent coins of these probabilities; over the x, which
    are independent, it is a binomial of mean (1 + total variation) / 2. The split at the median may thus depend on all
    scores. Its limit (Clopper, Pearson 1934) gives one for the total variation, hence for the strength.
    """
    significance = check_arguments(delta, confidence)
    check_whole_run(evidence, "order_statistics")
    check_independent(evidence, "order_statistics")
    m = evidence.num_records
    right = num_right(evidence, m - m // 2, m // 2)

    def bound(v: int) -> float:
        advantage = 2 * binomial_lower(v, m, significance) - 1
        return epsilon_of(family, strength_of_advantage(family, advantage), delta)

    return LowerBound(
        name="order of the scores",
        epsilon=bound(right),
        delta=delta,
        confidence=confidence,
        assumptions=(FAIR, INDEPENDENT, family.assumption),
        largest_possible=bound(m),
        observed=f"{right} of {m} guesses right, none left out",
    )


def clopper_pearson(
    evidence: Evidence, delta: float, confidence: float = 0.95, threshold: float | None = None
) -> LowerBound:
    """Bound epsilon from below by the false positive and false negative rates at one threshold; it assumes no shape.

    Args:
        evidence: m scores, independent given the coins; of whole runs.
        delta: the delta at which epsilon is bounded.
        confidence: of the bound.
        threshold: a score above it is taken for included. Fixed without these coins; None chooses it on every other
            record and tests it on the rest.

    Raises:
        ValueError: an argument out of range, scores of single steps, or scores that are not independent.

    Guarantees
    ----------
    Above the true epsilon with probability at most 1 - confidence, for every (epsilon, delta)-differentially private
    training (test_guarantee_no_bound_exceeds_the_truth_too_often): 1 - FNR <= e^epsilon FPR + delta, and with the rates
    changed over (Kairouz, Oh, Viswanath 2015; the audit of Jagielski, Ullman, Oprea 2020, arXiv:2006.07709). Each rate
    has a one-sided limit of Clopper and Pearson at half the significance; both hold together, and both inequalities are
    read off them.
    """
    return _at_threshold(evidence, delta, confidence, threshold, None)


def gdp_threshold(
    evidence: Evidence, delta: float, confidence: float = 0.95, threshold: float | None = None
) -> LowerBound:
    """Bound epsilon from below by the two error rates at one threshold, for mechanisms like Gaussian noise.

    Args, Raises: as `clopper_pearson`.

    Guarantees
    ----------
    Above the true epsilon with probability at most 1 - confidence, for every mechanism whose trade-off curve is that of
    a Gaussian release (test_guarantee_no_bound_exceeds_the_truth_too_often): then Phi^-1(1 - FPR) - Phi^-1(FNR) <= mu
    at every threshold, and the limits of the rates are those of `clopper_pearson` (Nasr et al. 2023, arXiv:2302.07956).
    """
    return _at_threshold(evidence, delta, confidence, threshold, GAUSSIAN)


def _at_threshold(
    evidence: Evidence, delta: float, confidence: float, threshold: float | None, family: Family | None
) -> LowerBound:
    significance = check_arguments(delta, confidence)
    name = "clopper_pearson" if family is None else "gdp_threshold"
    check_whole_run(evidence, name)
    check_independent(evidence, name)
    if threshold is not None and math.isnan(threshold):
        raise ValueError(
            "threshold must be a number; got NaN; fix one before looking at the coins, or leave it out"
        )
    chosen = threshold is None
    cut = _chosen_threshold(evidence) if threshold is None else threshold
    tested = slice(1, None, 2) if chosen else slice(None)
    scores, included = evidence.scores[tested], evidence.included[tested]
    guessed = scores > cut
    counts = (int((guessed & ~included).sum()), int((~guessed & included).sum()))
    sizes = (int((~included).sum()), int(included.sum()))

    def bound(false_positives: int, false_negatives: int) -> float:
        fpr = binomial_upper(false_positives, sizes[0], significance / 2)
        fnr = binomial_upper(false_negatives, sizes[1], significance / 2)
        if family is None:
            return max(log_ratio(1 - fnr - delta, fpr), log_ratio(1 - fpr - delta, fnr))
        return epsilon_of(family, float(-ndtri(fpr) - ndtri(fnr)), delta)

    where = "chosen on every other record" if chosen else "fixed in advance"
    return LowerBound(
        name="error rates" if family is None else "error rates, Gaussian curve",
        epsilon=bound(*counts),
        delta=delta,
        confidence=confidence,
        assumptions=(INDEPENDENT, *(() if family is None else (family.assumption,))),
        largest_possible=bound(0, 0),
        observed=f"{counts[0]} of {sizes[0]} false positives, {counts[1]} of {sizes[1]} false negatives at a threshold {where}",
    )


def log_ratio(above: float, below: float) -> float:
    """The logarithm of above / below where it is positive, else 0.0."""
    return math.log(above / below) if above > below > 0 else 0.0


def _chosen_threshold(evidence: Evidence) -> float:
    """The threshold that parts the coins of every other record (the first, the third, ...) with the fewest errors."""
    scores, included = evidence.scores[::2], evidence.included[::2]
    order = np.argsort(-scores, kind="stable")
    sorted_scores = scores[order]
    gained = np.cumsum(np.where(included[order], 1, -1))
    last_of_tie = np.append(sorted_scores[1:] != sorted_scores[:-1], True)
    best = int(np.argmax(np.where(last_of_tie, gained, -len(scores) - 1)))
    if gained[best] <= 0:
        return math.inf
    below = sorted_scores[best + 1] if best + 1 < len(scores) else -math.inf
    return _between(float(sorted_scores[best]), float(below))


def _between(high: float, low: float) -> float:
    """A threshold below `high` and not below `low`."""
    if math.isinf(high) or math.isinf(low):
        return low
    middle = low + (high - low) / 2
    return middle if middle < high else low
