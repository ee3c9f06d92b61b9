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

from dpopt.audit.bounds.lower_bound import LowerBound
from dpopt.audit.reports.controls import NEGATIVE, POSITIVE, POWER, Control
from dpopt.reports.report import rounded_up

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
    unsound = _failed(controls, NEGATIVE)
    if unsound is not None:
        told = f"No verdict: this audit sees leaks where there are none ({unsound.observed}); an assumption of its bounds fails."
        return Verdict(told, NO_POWER, best)
    if best.epsilon > claim.epsilon:
        shown, claimed = _apart(best.epsilon, claim.epsilon)
        told = (
            f"Refuted: {sure} the run leaked at least epsilon {shown} {at} ({best.name}); it claims at most "
        )
        return Verdict(f"{told}{claimed}.", REFUTED, best)
    if math.isinf(claim.epsilon):
        told = f"Nothing to refute: the run claims no epsilon; {sure} it leaked at least {rounded_down(best.epsilon)} {at}."
        return Verdict(told, STANDS, best)
    why = _powerless(claim, could, controls)
    if why is not None:
        told = f"No power: this audit says nothing of the claim of epsilon {rounded_up(claim.epsilon)} {at}: {why}."
        return Verdict(told, NO_POWER, best)
    told = f"Not refuted: the run claims epsilon {rounded_up(claim.epsilon)} {at} at most, and {sure} it leaked at least "
    rest = "" if could > claim.epsilon else f"; more than {rounded_down(could)} could not have been shown"
    return Verdict(f"{told}{rounded_down(best.epsilon)} ({best.name}){rest}.", STANDS, best)


def _powerless(claim: Claim, could: float, controls: Sequence[Control]) -> str | None:
    """Why an audit could not have refuted the claim; None where it could have."""
    if could < _FAR * claim.epsilon:
        return (
            f"perfect scores could have shown epsilon {rounded_down(could)} at most; audit with more canaries"
        )
    blind = _failed(controls, POSITIVE)
    if blind is not None:
        return f"its positive control, {blind.name}, was not detected"
    weak = _failed(controls, POWER)
    return (
        None
        if weak is None
        else f"{weak.name} {weak.observed}; audit with more canaries, more steps or a higher rate"
    )


def _failed(controls: Sequence[Control], kind: str) -> Control | None:
    return next((control for control in controls if control.kind == kind and not control.passed), None)


def rounded_down(value: float, digits: int = 2) -> str:
    """A lower bound for people: never above the bound."""
    if math.isinf(value):
        return "infinity"
    return f"{math.floor(value * 10**digits + 1e-9) / 10**digits:.{digits}f}"


def _apart(bound: float, claim: float) -> tuple[str, str]:
    """A lower bound above a claim, with as many digits as show it."""
    digits = 2
    while (
        math.isfinite(bound)
        and digits < 9
        and math.floor(bound * 10**digits) <= math.ceil(claim * 10**digits)
    ):
        digits += 1
    return rounded_down(bound, digits), rounded_up(claim, digits)
