# SPDX-License-Identifier: Apache-2.0
"""Every attack that the signals allow, on members and non-members: how well each does, and what it shows of epsilon.

The law of this file: which attacks are tried follows from the signals that are there, never from their values, and the
bounds pay for all of them; no threshold is chosen on the records that it is then counted on.

Shapes: n records, R reference models, S shadow models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dpopt.attacks import scores as attacks
from dpopt.attacks.curves import FALSE_POSITIVE_RATES, Interval, auc, tpr_at_fpr
from dpopt.attacks.scores import BoolArray, FloatArray
from dpopt.attacks.token_scores import TokenSignals, min_k_scores, token_info_rmia_scores
from dpopt.audit.bounds.families import GAUSSIAN, Family, any_mechanism
from dpopt.audit.bounds.lower_bound import LowerBound
from dpopt.audit.bounds.one_run import fdp_one_run, steinke
from dpopt.audit.evidence import Evidence

FEWEST_FOR_LIRA = 4
"""Shadow models, two on each side of a record, below which no spread can be seen."""


@dataclass(frozen=True, slots=True, eq=False)
class Signals:
    """What is known of each record; what is None is not known, and attacks that need it are not tried.

    Args:
        losses: (n,), under the model under attack; of a cross-entropy, so that exp(-loss) is a probability.
        tokens: of a language model, token by token, with a reference or without.
        reference_losses: (R, n), under models that did not see the records.
        shadow_losses: (S, n), under shadow models.
        shadow_included: (S, n), which record trained which.
        confidences: (n,), LiRA's phi of the model under attack; None: of exp(-loss). See `class_confidences`.
        shadow_confidences: (S, n), the same of the shadow models.
    """

    losses: FloatArray
    tokens: TokenSignals | None = None
    reference_losses: FloatArray | None = None
    shadow_losses: FloatArray | None = None
    shadow_included: BoolArray | None = None
    confidences: FloatArray | None = None
    shadow_confidences: FloatArray | None = None


class Attacked(NamedTuple):
    """One attack: its scores, its area under the ROC curve, and its true-positive rates by false-positive rate."""

    scores: FloatArray
    auc: Interval
    tpr: dict[float, Interval]
    bound: LowerBound


@dataclass(frozen=True, slots=True, eq=False)
class AttackReport:
    """All attacks on one model.

    Args:
        member: (n,), which records took part.
        attacks: by name, in the order in which they were tried.
        controls: what tells members from non-members without the model: an AUC away from a half means that the two sets
            differ by themselves, and then the attacks show nothing.
        confidence: of each interval, and of all bounds together.
        delta: at which epsilon is bounded.
        about: what the models, files and settings were.
    """

    member: BoolArray
    attacks: Mapping[str, Attacked]
    controls: Mapping[str, Interval]
    confidence: float
    delta: float
    about: Mapping[str, object]

    @property
    def suspicious_controls(self) -> list[str]:
        """The controls whose interval does not hold a half."""
        return [name for name, one in self.controls.items() if not one.low <= 0.5 <= one.high]


def all_scores(signals: Signals) -> dict[str, FloatArray]:
    """The scores of every attack that the signals allow, by name; higher means member."""
    scores = {"loss": attacks.loss_scores(signals.losses)}
    if signals.tokens is not None:
        scores["Min-K%++"] = min_k_scores(signals.tokens)
    if signals.reference_losses is not None:
        ratios = -signals.losses - attacks.mean_probabilities(-signals.reference_losses)
        scores["calibrated loss"] = attacks.calibrated_scores(signals.losses, signals.reference_losses)
        scores["RMIA"] = attacks.rmia_scores(ratios, ratios)
        scores["InfoRMIA"] = attacks.info_rmia_scores(ratios, ratios)
    if signals.tokens is not None and signals.tokens.reference is not None:
        scores["InfoRMIA of tokens"] = token_info_rmia_scores(signals.tokens)
    return scores | _with_shadows(signals)


def run_attacks(
    signals: Signals,
    member: BoolArray,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    gaussian: bool = False,
    controls: Mapping[str, FloatArray] | None = None,
    about: Mapping[str, object] | None = None,
) -> AttackReport:
    """Try every attack that the signals allow.

    Args:
        signals: of n records.
        member: (n,), which took part in the training.
        delta: at which epsilon is bounded.
        confidence: of each interval, and of all lower bounds together.
        gaussian: bound epsilon as of training that leaks no more than one Gaussian release, at any delta, which allows
            larger bounds; False assumes nothing of its shape.
        controls: (n,) numbers that know nothing of the model, e.g. lengths; see `AttackReport`.
        about: kept in the report.

    Returns:
        The report.

    Guarantees
    ----------
    If each record was a member by its own fair coin, the largest of the bounds is above the true epsilon with
    probability at most 1 - confidence: each of K attacks is bounded at 1 - (1 - confidence) / K
    (test_guarantee_the_best_of_many_attacks_is_paid_for).
    """
    member = np.asarray(member)
    scores = all_scores(signals)
    sure = 1 - (1 - confidence) / len(scores)
    family = GAUSSIAN if gaussian else any_mechanism(delta)
    found = {
        name: Attacked(
            values,
            auc(values, member, confidence=confidence),
            {rate: tpr_at_fpr(values, member, rate, confidence=confidence) for rate in FALSE_POSITIVE_RATES},
            lower_bound(values, member, name, delta=delta, confidence=sure, family=family),
        )
        for name, values in scores.items()
    }
    compared = {name: auc(values, member, confidence=confidence) for name, values in (controls or {}).items()}
    return AttackReport(member, found, compared, confidence, delta, dict(about or {}))


def lower_bound(
    scores: FloatArray,
    member: BoolArray,
    name: str,
    *,
    delta: float,
    confidence: float,
    family: Family = GAUSSIAN,
) -> LowerBound:
    """Epsilon's lower bound from one attack: the records at both ends are guessed, a share fixed beforehand.

    Args:
        scores: (n,).
        member: (n,), by fair coins.
        name: of the attack.
        delta: at which epsilon is bounded.
        confidence: of this bound.
        family: see `dpopt.audit.bounds.families`; for any mechanism the guesses are counted as in Steinke et al. 2023.
    """
    # Ties go to the earlier records, and files list members first: their order must not be a hint.
    order = np.random.default_rng(0).permutation(len(scores))
    evidence = Evidence(scores[order], member[order], name)
    found = (
        steinke(evidence, delta, confidence)
        if family.name != GAUSSIAN.name
        else fdp_one_run(evidence, delta, confidence, family=family)
    )
    return replace(found, evidence=name)


def _with_shadows(signals: Signals) -> dict[str, FloatArray]:
    losses, included = signals.shadow_losses, signals.shadow_included
    if losses is None or included is None:
        return {}
    phi = signals.confidences
    phi = attacks.logit_confidences(-signals.losses) if phi is None else phi
    shadow_phi = signals.shadow_confidences
    shadow_phi = attacks.logit_confidences(-losses) if shadow_phi is None else shadow_phi
    online = -signals.losses - attacks.mean_probabilities(-losses)
    offline = -signals.losses - attacks.mean_probabilities(-losses, included, offline_a=1.0)
    lira = {} if len(losses) < FEWEST_FOR_LIRA else {
        "LiRA, online": attacks.lira_online_scores(phi, shadow_phi, included),
        "LiRA, offline": attacks.lira_offline_scores(phi, shadow_phi, included),
    }  # fmt: skip
    return lira | {
        "RMIA, shadows, online": attacks.rmia_scores(online, online),
        "RMIA, shadows, offline": attacks.rmia_scores(offline, offline),
        "InfoRMIA, shadows": attacks.info_rmia_scores(online, online),
    }
