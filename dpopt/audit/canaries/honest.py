# SPDX-License-Identifier: Apache-2.0
"""Where a canary cannot be an honest record: refused, with what to do instead."""

from __future__ import annotations

from dpopt.audit.canaries.canary import Canaries
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.stage import Stage
from dpopt.mechanisms import Mechanism


def require_honest(canaries: Canaries, estimator: Estimator, mechanism: Mechanism) -> None:
    """Refuse a run in which a canary would not be what every record is, or could not be told from the noise.

    Raises:
        ValueError: what each example adds depends on its own past, is partly hidden, or is bounded in each coordinate;
            or the mechanism does not tell its noise.
    """
    stage = estimator.stage(0)
    if stage.contribution.of_records is not None:
        raise ValueError(
            "expected an estimator without a memory of each record in an audited run; got one that keeps a place for every "
            "record, and none for canaries; take another, such as flat, or leave audit out"
        )
    if canaries.is_dirac:
        _require_seen(estimator, stage)
    if canaries.is_dirac and getattr(mechanism, "stds", None) is None:
        raise ValueError(
            "expected a mechanism that tells its noise (stds) where Dirac canaries are scored; got "
            f"{type(mechanism).__name__}; use GaussianMechanism, or input canaries (records= and losses=)"
        )


def _require_seen(estimator: Estimator, stage: Stage) -> None:
    if stage.fold is not None or stage.contribution.hidden:
        raise ValueError(
            "expected an estimator that releases all it sums where Dirac canaries are scored; got one with hidden state, in "
            "which all canaries meet; take flat or two_threshold, or input canaries (records= and losses=)"
        )
    if getattr(estimator, "coordinates", None) is not None:
        raise ValueError(
            "expected an estimator that leaves a gradient at one coordinate its clip norm; got one that bounds every "
            "coordinate by itself, which hides such canaries; take flat or huber, or input canaries (records= and losses=)"
        )
