# SPDX-License-Identifier: Apache-2.0
"""How well scores tell members from non-members: the ROC curve, its area, and what holds at few false alarms.

The law of this file: an interval holds whatever the scores are distributed like, or says what it assumes. These are
descriptions of an attack. None of them bounds epsilon: see `battery`.

Shapes: n records, m members, k non-members, n = m + k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import beta, binom, norm, rankdata

from dpopt.attacks.scores import BoolArray, FloatArray

FALSE_POSITIVE_RATES = (0.001, 0.01)
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A value and the interval that holds the true one with the stated confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class Roc:
    """The curve of an attack: rates at every threshold, from none called a member to all of them.

    Args:
        false_positives: (points,), share of the non-members at or above the threshold, rising.
        true_positives: (points,), share of the members.
        thresholds: (points,), falling; the first is infinite.
    """

    false_positives: FloatArray
    true_positives: FloatArray
    thresholds: FloatArray


def roc(scores: FloatArray, member: BoolArray) -> Roc:
    """The ROC curve; tied scores make one point.

    Args:
        scores: (n,), higher for members.
        member: (n,), which took part.
    """
    scores, member = _both(scores, member)
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    true, false = np.cumsum(member[order])[last], np.cumsum(~member[order])[last]
    return Roc(
        np.concatenate([[0.0], false / false[-1]]),
        np.concatenate([[0.0], true / true[-1]]),
        np.concatenate([[np.inf], scores[order][last]]),
    )


def auc(scores: FloatArray, member: BoolArray, *, confidence: float = CONFIDENCE) -> Interval:
    """The area under the curve: the chance that a member scores above a non-member, ties counting half.

    The interval is DeLong's on the logit scale (large samples, independent records); where every pair is in order,
    that of a rate that was never missed in min(m, k) tries.

    Args:
        scores: (n,).
        member: (n,).
        confidence: of the interval.
    """
    scores, member = _both(scores, member)
    m, k = int(member.sum()), int((~member).sum())
    joint = rankdata(scores)
    beaten = (joint[member] - rankdata(scores[member])) / k
    lost = 1 - (joint[~member] - rankdata(scores[~member])) / m
    area = float(beaten.mean())
    spread = np.sqrt(_variance(beaten) / m + _variance(lost) / k)
    if not 0 < area < 1 or spread == 0:
        edge = ((1 - confidence) / 2) ** (1 / min(m, k))
        return Interval(area, *((edge, 1.0) if area > 0.5 else (0.0, 1 - edge) if area < 0.5 else (0.0, 1.0)))
    centre, width = np.log(area / (1 - area)), norm.ppf((1 + confidence) / 2) * spread / (area * (1 - area))
    low, high = (1 / (1 + np.exp(-(centre + sign * width))) for sign in (-1, 1))
    return Interval(area, float(low), float(high))


def tpr_at_fpr(
    scores: FloatArray, member: BoolArray, rate: float, *, confidence: float = CONFIDENCE
) -> Interval:
    """The share of members found by the lowest threshold that at most a share `rate` of the non-members reach.

    The interval is for the true share at that true rate, and holds for every distribution of independent scores: the
    threshold lies between two order statistics of the non-members, and the share between Clopper-Pearson bounds there.
    With fewer than about 4 / rate non-members they cannot tell where the threshold is, and the low end is 0.

    Args:
        scores: (n,).
        member: (n,).
        rate: false-positive rate in (0, 1).
        confidence: of the interval.
    """
    scores, member = _both(scores, member)
    if not 0 < rate < 1:
        raise ValueError(f"expected a false-positive rate in (0, 1); got {rate!r}; 0.01 is usual")
    own, others = scores[member], np.sort(scores[~member])[::-1]
    m, k, tail = len(own), len(others), (1 - confidence) / 4
    found = _above(own, others, int(np.floor(rate * k + 1e-9)))
    # Of k scores of non-members, Binomial(k, rate) lie above the true threshold.
    strict = _above(own, others, max(int(binom.ppf(tail, k, rate)) - 1, -1))
    loose = _above(own, others, int(binom.ppf(1 - tail, k, rate)))
    return Interval(found / m, clopper_pearson(strict, m, tail)[0], clopper_pearson(loose, m, tail)[1])


def clopper_pearson(hits: int, tries: int, tail: float) -> tuple[float, float]:
    """The bounds on a rate that are missed with probability `tail` at most on each side.

    Args:
        hits: how often it happened.
        tries: of how many, >= 1.
        tail: probability for one side.
    """
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, tries - hits + 1))
    high = 1.0 if hits == tries else float(beta.ppf(1 - tail, hits + 1, tries - hits))
    return low, high


def _above(own: FloatArray, others: FloatArray, passed: int) -> int:
    """How many of `own` lie above every score of `others` (falling) but the first `passed`."""
    if passed < 0:
        return 0
    return int((own > others[passed]).sum()) if passed < len(others) else len(own)


def _variance(values: FloatArray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def _both(scores: FloatArray, member: BoolArray) -> tuple[FloatArray, BoolArray]:
    scores, member = np.asarray(scores, dtype=np.float64), np.asarray(member)
    if scores.ndim != 1 or member.dtype != np.bool_ or member.shape != scores.shape:
        raise ValueError(
            f"expected scores (n,) and as many booleans; got {scores.shape} and {member.dtype} of shape {member.shape}; "
            "pass one of each for every record"
        )
    if np.isnan(scores).any():
        raise ValueError("expected scores that are numbers; got NaN; leave such records out of both sets")
    if member.all() or not member.any():
        raise ValueError(
            f"expected members and non-members; got {int(member.sum())} members of {len(member)} records; pass some of "
            "each"
        )
    return scores, member
