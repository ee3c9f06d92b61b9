# SPDX-License-Identifier: Apache-2.0
"""The verdict of an audit: a claim against every lower bound, in one sentence, and an exit code.

| code | meaning |
|---|---|
| 0 | no lower bound exceeds the claim, and one could have |
| 1 | a lower bound exceeds the claim: it is refuted, at the stated confidence |
| 3 | the audit had no power to say anything about this claim |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpopt.audit.bounds import LowerBound
from dpopt.audit.controls import Control

STANDS, REFUTED, NO_POWER = 0, 1, 3
_FAR = 0.5  # of the claim: an audit that can show no more than this share of it says nothing about it


@dataclass(frozen=True, slots=True)
class Claim:
    """What a run says of itself: an upper bound, by which method and under which assumptions."""

    epsilon: float
    delta: float
    method: str
    assumptions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One sentence, its exit code, and the bound that it rests on."""

    sentence: str
    exit_code: int
    bound: LowerBound


def verdict(
    claim: Claim, bounds: Sequence[LowerBound], controls: Sequence[Control], confidence: float
) -> Verdict:
    """Hold the claim against all bounds, which hold together at `confidence` (see `battery.lower_bounds`).

    Args:
        claim: what the run says.
        bounds: at least one, all at the delta of the claim.
        controls: what was tried to see whether the audit sees.
        confidence: with which all bounds hold together.

    Raises:
        ValueError: there is no bound, or one is about another delta.

    Guarantees
    ----------
    A true claim is refuted with probability at most 1 - confidence, under the assumptions of the bound named
    (test_guarantee_a_true_claim_is_refuted_no_more_often_than_stated).
    """
    if not bounds or any(bound.delta != claim.delta for bound in bounds):
        raise ValueError(
            f"bounds must be about the claim's delta {claim.delta:g}; got {[bound.delta for bound in bounds]}; compute them "
            "at that delta"
        )
    best = max(bounds, key=lambda bound: bound.epsilon)
    could = max(bound.largest_possible for bound in bounds)
    sure = f"at {100 * confidence:.4g} % confidence"
    at = f"at delta {claim.delta:g}"
    if best.epsilon > claim.epsilon:
        told = f"Refuted: {sure} the run leaked more than epsilon {_down(best.epsilon)} {at} ({best.title}); it claims "
        return Verdict(told + f"at most {_up(claim.epsilon)}.", REFUTED, best)
    if math.isinf(claim.epsilon):
        told = f"Nothing to refute: the run claims no epsilon; {sure} it leaked at least {_down(best.epsilon)} {at}."
        return Verdict(told, STANDS, best)
    blind = [
        control.name for control in controls if control.name.startswith("positive") and not control.passed
    ]
    if blind or could < _FAR * claim.epsilon:
        why = (
            f"its control ({blind[0]}) was not detected"
            if blind
            else f"perfect scores could have shown epsilon {_down(could)} at most; audit with more canaries"
        )
        return Verdict(
            f"No power: this audit says nothing of the claim of epsilon {_up(claim.epsilon)} {at}: {why}.",
            NO_POWER,
            best,
        )
    told = f"Not refuted: the run claims epsilon {_up(claim.epsilon)} {at} at most, and {sure} it leaked at least "
    rest = "" if could > claim.epsilon else f"; more than {_down(could)} could not have been shown"
    return Verdict(f"{told}{_down(best.epsilon)} ({best.title}){rest}.", STANDS, best)


def _down(epsilon: float) -> str:
    return "any number" if math.isinf(epsilon) else f"{math.floor(epsilon * 100 + 1e-9) / 100:.2f}"


def _up(epsilon: float) -> str:
    return "infinity" if math.isinf(epsilon) else f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"
