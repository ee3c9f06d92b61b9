# SPDX-License-Identifier: Apache-2.0
"""What every lower bound on epsilon is, and the arithmetic that the bounds share.

The law of this folder's `bounds_*` files: **a lower bound exceeds the true epsilon with a probability of at most
1 - confidence**, over the coins and the randomness of the training, wherever its assumptions hold. Nothing that a bound
chooses (how many guesses, which threshold) may depend on the coins that it is then tested on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from accountants.curve import check_delta
from dpopt.audit.bounds.families import MOST, Family
from dpopt.audit.evidence import BoolArray, Evidence, FloatArray

FAIR = "each record was included by its own fair coin, which nothing but the training saw"
INDEPENDENT = "given the coins, the scores are independent of one another (each record has noise to itself)"


@dataclass(frozen=True, slots=True)
class LowerBound:
    """An epsilon that the run is not below, at a stated confidence, if the assumptions hold.

    `largest_possible` is what the same bound would have said of perfect scores: where it is below the claim, a low
    `epsilon` says nothing in favour of the run. `observed` is what was counted or measured, in words; `evidence` the kind
    of the scores where several were looked at.
    """

    name: str
    epsilon: float
    delta: float
    confidence: float
    assumptions: tuple[str, ...]
    largest_possible: float
    observed: str
    evidence: str = ""

    @property
    def title(self) -> str:
        """Its name, and the kind of the scores where that is told."""
        return f"{self.name} ({self.evidence})" if self.evidence else self.name


def check_arguments(delta: float, confidence: float) -> float:
    """Return the significance 1 - confidence; refuse a delta or a confidence that is none."""
    check_delta(delta)
    if isinstance(confidence, bool) or not (isinstance(confidence, int | float) and 0.5 <= confidence < 1):
        raise ValueError(f"confidence must be in [0.5, 1); got {confidence!r}; pass e.g. confidence=0.95")
    return 1 - confidence


def check_independent(evidence: Evidence, name: str) -> None:
    """Refuse evidence whose scores may hang together, for a bound that would be wrong about it."""
    if not evidence.independent:
        raise ValueError(
            f"{name} must have scores that are independent given the coins; got evidence of kind {evidence.kind!r} that does "
            "not say so; use steinke or fdp_one_run, or give one record each of many runs"
        )


def check_whole_run(evidence: Evidence, name: str) -> None:
    """Refuse scores of single steps, for a bound about whole runs."""
    if evidence.per_step:
        raise ValueError(
            f"{name} must have scores of a whole run; got scores of single steps, whose epsilon is not that of the run; use "
            "per_step"
        )


def confident(scores: FloatArray, top: int, bottom: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the indices of the `top` largest and the `bottom` smallest scores; ties go to the earlier records."""
    order = np.argsort(-scores, kind="stable")
    return order[:top], order[len(order) - bottom :]


def num_right(evidence: Evidence, top: int, bottom: int) -> int:
    """How many guesses are right that take the `top` largest scores for included and the `bottom` smallest for left out."""
    included: BoolArray = evidence.included
    first, last = confident(evidence.scores, top, bottom)
    return int(included[first].sum()) + int((~included[last]).sum())


def binomial_lower(right: int, total: int, significance: float) -> float:
    """The Clopper-Pearson lower limit of a probability, of `right` successes in `total` independent trials."""
    return 0.0 if right == 0 else float(betaincinv(right, total - right + 1, significance))


def binomial_upper(right: int, total: int, significance: float) -> float:
    """The Clopper-Pearson upper limit of a probability; 1.0 of no trials."""
    return 1.0 if right == total else 1.0 - binomial_lower(total - right, total, significance)


def largest_refuted(refuted: Callable[[float], bool], most: float = MOST, factor: float = 1.25) -> float:
    """The strength up to which every strength is refuted, to 1e-6 relative, from below; 0.0 where none is.

    It goes up by `factor` until a strength stands, so that it never steps over one that is not refuted and is looked at.
    """
    low, high = 0.0, 1e-3
    if not refuted(low):
        return 0.0
    while refuted(high):
        low, high = high, high * factor
        if high > most:
            return most
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


@lru_cache(maxsize=1024)
def strength_of_advantage(family: Family, advantage: float) -> float:
    """The largest strength whose advantage lies below `advantage`; 0.0 where that of strength 0 does not."""
    if advantage <= 0:
        return 0.0
    return largest_refuted(lambda strength: family.advantage(strength) < advantage, factor=2.0)  # it rises


def epsilon_of(family: Family, strength: float, delta: float) -> float:
    """The epsilon of a strength; 0.0 of none, infinite past the largest that is looked at."""
    if strength <= 0:
        return 0.0
    return math.inf if strength >= MOST else family.epsilon(strength, delta)
