# SPDX-License-Identifier: Apache-2.0
"""Controls of an audit: that it sees a leak, and sees none where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binom, chi2

from dpopt.audit.bounds.families import GAUSSIAN, poisson_steps, strength_of_epsilon
from dpopt.audit.bounds.lower_bound import LowerBound
from dpopt.audit.evidence import Evidence

Bounds = Callable[[Sequence[Evidence]], tuple[LowerBound, ...]]
POSITIVE, NEGATIVE, POWER, NOISE = "positive", "negative", "power", "noise as recorded"
KINDS = (POSITIVE, NEGATIVE, POWER, NOISE)
_DRAWS, _LEAKS = 20, 5


@dataclass(frozen=True, slots=True)
class Control:
    """What a control is, whether it came out as it must, and what was seen, in words; `kind` is one of `KINDS`."""

    kind: str
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
        kind=POSITIVE,
        name=what,
        passed=seen >= min(claim, could / 2) > 0,
        observed=f"shows {_told(seen)}; perfect scores would show {_told(could)}",
    )


def negative(evidence: Sequence[Evidence], bounds: Bounds, confidence: float, seed: int = 0) -> Control:
    """The same bounds on coins drawn anew, 20 times: they may rise above 0 as often as their confidence says.

    It fails where they do so more often than a sound audit does once in a thousand times.
    """
    rng = np.random.default_rng(seed)
    seen = [max(b.epsilon for b in bounds([redrawn(one, rng) for one in evidence])) for _ in range(_DRAWS)]
    above = sum(epsilon > 0 for epsilon in seen)
    return Control(
        kind=NEGATIVE,
        name="other coins",
        passed=bool(above <= binom.ppf(0.999, _DRAWS, 1 - confidence)),
        observed=f"{above} of {_DRAWS} draws show any leak, at most {_told(max(seen))}",
    )


def power(evidence: Sequence[Evidence], bounds: Bounds, claim: float, delta: float, seed: int = 0) -> Control:
    """The same bounds on as many scores of a run that leaks all of its claim, five times.

    It is a run of the recorded steps where single steps were scored, else one Gaussian release. It fails where in the
    median the bounds show less than a quarter of the claim.
    """
    rng = np.random.default_rng(seed)
    steps = next((one for one in evidence if one.num_steps is not None), None)
    family = GAUSSIAN if steps is None else poisson_steps(steps.sampling_rate or 1.0, steps.num_steps or 1)
    strength = strength_of_epsilon(family, claim, delta)
    seen = [
        max(b.epsilon for b in bounds([_leaking(one, strength, steps, rng) for one in evidence]))
        for _ in range(_LEAKS)
    ]
    typical = float(np.median(seen))
    return Control(
        kind=POWER,
        name="a run that leaks all it claims",
        passed=typical >= claim / 4,
        observed=f"shows {_told(typical)} of {claim:.2f}, in the median of {_LEAKS} draws",
    )


def _leaking(one: Evidence, strength: float, steps: Evidence | None, rng: np.random.Generator) -> Evidence:
    """Scores of the records of `one` in a run of this strength: of steps, their sum, or their likelihood ratio."""
    m, included = one.num_records, one.included
    if one.per_step or steps is None:
        return replace(one, scores=(one.noise_std or 1.0) * (rng.standard_normal(m) + strength * included))
    rate, count = steps.sampling_rate or 1.0, steps.num_steps or 1
    if one.noise_std is not None:
        took_part = rng.binomial(count, rate, m) * included
        return replace(
            one, scores=one.noise_std * (rng.standard_normal(m) + strength * took_part / math.sqrt(count))
        )
    ratios = np.zeros(m)
    for _ in range(count):
        seen = rng.standard_normal(m) + strength * (included & (rng.random(m) < rate))
        ratios += np.log1p(rate * np.expm1(np.minimum(strength * seen - strength**2 / 2, 700.0)))
    return replace(one, scores=ratios)


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
        kind=NOISE,
        name=evidence.kind,
        passed=low <= ratio <= high,
        observed=f"{ratio:.4f} times the recorded deviation in {len(out)} scores; {low:.3f} to {high:.3f} is chance",
    )


def _told(epsilon: float) -> str:
    return "a leak without limit" if math.isinf(epsilon) else f"epsilon {epsilon:.2f}"
