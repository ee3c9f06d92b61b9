# SPDX-License-Identifier: Apache-2.0
"""Controls of an audit: that it sees a leak, and sees none where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binom, chi2

from dpopt.audit.bounds import LowerBound
from dpopt.audit.evidence import Evidence

Bounds = Callable[[Sequence[Evidence]], tuple[LowerBound, ...]]
_DRAWS = 20


@dataclass(frozen=True, slots=True)
class Control:
    """What a control is, whether it came out as it must, and what was seen, in words."""

    name: str
    passed: bool
    observed: str


def released(evidence: Evidence) -> Evidence:
    """The same records where the coins themselves were released: the scores of a run without any privacy.

    Scores keep their scale: those of included records are moved up past all others.
    """
    finite = evidence.scores[np.isfinite(evidence.scores)]
    spread = float(np.ptp(finite)) if len(finite) else 0.0
    unit = max(spread, evidence.noise_std or 0.0, 1e-9)
    scores = np.where(evidence.included, 100.0, 0.0) * unit + np.linspace(
        0.0, 1e-6 * unit, evidence.num_records
    )
    return replace(evidence, scores=scores)


def redrawn(evidence: Evidence, rng: np.random.Generator) -> Evidence:
    """The same scores with coins that have nothing to do with them: fair ones, or for single steps the same, shuffled."""
    if evidence.per_step:
        return replace(evidence, included=rng.permutation(evidence.included))
    return replace(evidence, included=rng.random(evidence.num_records) < 0.5)


def positive(
    evidence: Sequence[Evidence], bounds: Bounds, claim: float, twin: Sequence[Evidence] | None = None
) -> Control:
    """The same bounds on a run that keeps nothing: the coins themselves, or the scores of a twin without noise.

    It fails where they stay below the claim and below half of what they could have shown.
    """
    told = bounds([released(one) for one in evidence] if twin is None else twin)
    seen, could = max(b.epsilon for b in told), max(b.largest_possible for b in told)
    what = "released coins" if twin is None else "a twin without privacy"
    return Control(
        name=f"positive: {what}",
        passed=seen >= min(claim, could / 2) > 0,
        observed=f"shows epsilon {_told(seen)} at least; perfect scores would show {_told(could)}",
    )


def negative(evidence: Sequence[Evidence], bounds: Bounds, confidence: float, seed: int = 0) -> Control:
    """The same bounds on coins drawn anew, 20 times: they may rise above 0 as often as their confidence says.

    It fails where they do so more often than a sound audit does once in a thousand times.
    """
    rng = np.random.default_rng(seed)
    seen = [max(b.epsilon for b in bounds([redrawn(one, rng) for one in evidence])) for _ in range(_DRAWS)]
    above = sum(epsilon > 0 for epsilon in seen)
    return Control(
        name="negative: other coins",
        passed=bool(above <= binom.ppf(0.999, _DRAWS, 1 - confidence)),
        observed=f"{above} of {_DRAWS} draws show any leak, the largest epsilon {_told(max(seen))}",
    )


def noise(evidence: Evidence) -> Control | None:
    """Whether the noise in the scores of records that did not take part is what the run recorded; None if unknown.

    It fails where the deviation is so far off, either way, as happens once in a thousand times.
    """
    out = evidence.scores[~evidence.included]
    if evidence.noise_std is None or len(out) < 2 or not np.isfinite(out).all():
        return None
    ratio = float(out.std(ddof=1)) / evidence.noise_std
    low, high = (math.sqrt(float(chi2.ppf(p, len(out) - 1)) / (len(out) - 1)) for p in (0.0005, 0.9995))
    return Control(
        name=f"noise as recorded: {evidence.kind}",
        passed=low <= ratio <= high,
        observed=f"{ratio:.4f} times the recorded deviation in {len(out)} scores; {low:.3f} to {high:.3f} is chance",
    )


def _told(epsilon: float) -> str:
    return "without limit" if math.isinf(epsilon) else f"{epsilon:.2f}"
