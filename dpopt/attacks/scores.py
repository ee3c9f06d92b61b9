# SPDX-License-Identifier: Apache-2.0
"""Membership inference: from what a model says of each record to a score, higher for those it seems to have seen.

The law of this file: an attack is a function of signals, not of a model, and it is not told who is a member. What it
returns therefore does not depend on the order of the records, on batches or on devices.

Shapes: n records, R reference models, S shadow models, Z population records.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

ENOUGH_PER_RECORD = 32
"""Shadow scores on each side of a record from which LiRA estimates a spread for every record by itself."""
_SMALLEST_SPREAD = 1e-9


def loss_scores(losses: FloatArray) -> FloatArray:
    """The loss attack: minus the loss.

    Args:
        losses: (n,), of the model under attack.

    Returns:
        (n,) scores.
    """
    return -_finite("losses", losses, 1)


def calibrated_scores(losses: FloatArray, reference_losses: FloatArray) -> FloatArray:
    """The loss attack corrected for how hard each record is: mean reference loss minus loss (Watson et al. 2022).

    Args:
        losses: (n,), of the model under attack.
        reference_losses: (R, n), of models that did not see the records.

    Returns:
        (n,) scores.
    """
    losses = _finite("losses", losses, 1)
    return _finite("reference_losses", reference_losses, 2, len(losses)).mean(0) - losses


def logit_confidences(log_probabilities: FloatArray) -> FloatArray:
    """log(p / (1 - p)) of a probability, which is nearly Gaussian over training runs (Carlini et al. 2022).

    Args:
        log_probabilities: log p, any shape, at most 0; of a language model: the mean over the record's tokens.

    Returns:
        The same shape. A probability that rounds to 1 counts as the largest float below it.
    """
    log_p = np.minimum(np.asarray(log_probabilities, dtype=np.float64), -np.finfo(np.float64).epsneg)
    return log_p - np.log(-np.expm1(log_p))


def lira_online_scores(
    signals: FloatArray,
    shadow_signals: FloatArray,
    shadow_included: BoolArray,
    *,
    per_record: bool | None = None,
) -> FloatArray:
    """LiRA with shadow models on both sides: log N(phi; in) - log N(phi; out), each record's own Gaussians.

    Carlini et al. 2022 (arXiv 2112.03570).

    Args:
        signals: (n,), phi of the model under attack, e.g. `logit_confidences`.
        shadow_signals: (S, n), phi of the shadow models.
        shadow_included: (S, n), whether record i trained shadow model s.
        per_record: whether each record gets standard deviations of its own, or all share two pooled ones, taken
            around each record's own means; default: its own from `ENOUGH_PER_RECORD` scores on each side.

    Returns:
        (n,) scores.

    Raises:
        ValueError: a record has no shadow model on one side, or too few for a spread.
    """
    signals, shadows, included = _shadows(signals, shadow_signals, shadow_included)
    own = _own_spread(included, per_record)
    mean_in, spread_in = _moments("with", shadows, included, own)
    mean_out, spread_out = _moments("without", shadows, ~included, own)
    return _log_normal(signals, mean_in, spread_in) - _log_normal(signals, mean_out, spread_out)


def lira_offline_scores(
    signals: FloatArray,
    shadow_signals: FloatArray,
    shadow_included: BoolArray,
    *,
    per_record: bool | None = None,
) -> FloatArray:
    """LiRA with shadow models that did not see the record: in the order of P[N(out) < phi].

    Carlini et al. 2022. The score is (phi - mean) / deviation, of which that probability is an increasing
    function that rounds to 1 for the records that matter most.

    Args:
        signals: (n,), phi of the model under attack.
        shadow_signals: (S, n), phi of the shadow models; those that saw a record are left out for it.
        shadow_included: (S, n), whether record i trained shadow model s.
        per_record: as for `lira_online_scores`.

    Returns:
        (n,) scores.

    Raises:
        ValueError: a record has no shadow model that did not see it, or there are too few for a spread.
    """
    signals, shadows, included = _shadows(signals, shadow_signals, shadow_included)
    mean, spread = _moments("without", shadows, ~included, _own_spread(included, per_record, out_only=True))
    return (signals - mean) / spread


def mean_probabilities(
    log_probabilities: FloatArray, included: BoolArray | None = None, *, offline_a: float | None = None
) -> FloatArray:
    """log Pr(x), what is expected of a model that may or may not have seen x: the denominator of RMIA's ratios.

    Args:
        log_probabilities: (R, n), log p(x) of reference models.
        included: (R, n), who saw what; None: none of them saw any record.
        offline_a: None: the mean of all models, half of which saw the record ("online"). A number a in [0, 1]: only
            those that did not, with p_in taken for a * p_out + 1 - a, so that Pr(x) = ((1 + a) p_out + 1 - a) / 2
            (Zarifzadeh et al. 2024); a = 1 is their plain mean.

    Returns:
        (n,) logarithms.
    """
    log_p = _finite("log_probabilities", log_probabilities, 2)
    if offline_a is None or included is None:
        mean = logsumexp(log_p, axis=0) - np.log(len(log_p))
    else:
        out = ~np.asarray(included, dtype=bool)
        _require_models("without", out)
        mean = logsumexp(np.where(out, log_p, -np.inf), axis=0) - np.log(out.sum(0))
    if offline_a is None or offline_a == 1:
        return np.asarray(mean)
    if not 0 <= offline_a < 1:
        raise ValueError(f"expected offline_a in [0, 1]; got {offline_a!r}; 1 takes p_in for p_out")
    return np.logaddexp(np.log1p(offline_a) + mean, np.log1p(-offline_a)) - np.log(2)


def rmia_scores(ratios: FloatArray, population_ratios: FloatArray, *, gamma: float = 1.0) -> FloatArray:
    """RMIA: the share of population records z with (p(x) / Pr(x)) / (p(z) / Pr(z)) >= gamma.

    Zarifzadeh et al. 2024 (arXiv 2312.03262). For one model the score is an increasing function of the
    ratio of x alone, with ties: it orders records as the ratio does, and says how extreme one is.

    Args:
        ratios: (n,), log p(x) - log Pr(x); `mean_probabilities` gives the second.
        population_ratios: (Z,), the same of population records; the records under attack may stand among them.
        gamma: the ratio that counts; values other than 1 suit probabilities of classes rather than mean
            probabilities of tokens, whose ratios all lie near 1.

    Returns:
        (n,) scores in [0, 1].
    """
    ratios, population = _finite("ratios", ratios, 1), _finite("population_ratios", population_ratios, 1)
    if not gamma > 0:
        raise ValueError(f"expected gamma > 0; got {gamma!r}; 1 asks whether x's ratio is the larger one")
    reached = np.searchsorted(np.sort(population), ratios - np.log(gamma), side="right")
    return reached / len(population)


def info_rmia_scores(ratios: FloatArray, population_ratios: FloatArray) -> FloatArray:
    """InfoRMIA of whole records: by how many nats x's ratio exceeds the population's mean.

    The information-theoretic form of RMIA's test (Tao and Shokri, arXiv 2510.05582): the mean over z of the logarithm
    of the ratio that `rmia_scores` compares with gamma. For one model it orders records as `ratios` do; the
    population makes scores of several models comparable.

    Args:
        ratios: (n,), log p(x) - log Pr(x).
        population_ratios: (Z,), the same of population records.

    Returns:
        (n,) scores in nats.
    """
    return _finite("ratios", ratios, 1) - _finite("population_ratios", population_ratios, 1).mean()


def _moments(side: str, scores: FloatArray, mask: BoolArray, own: bool) -> tuple[FloatArray, FloatArray]:
    _require_models(side, mask)
    count = mask.sum(0)
    mean = np.where(mask, scores, 0.0).sum(0) / count
    squares = np.where(mask, (scores - mean) ** 2, 0.0).sum(0)
    freedom = count - 1 if own else (count - 1).sum()
    if np.any(freedom < 1):
        raise ValueError(
            f"expected shadow scores that show a spread {side} the record; got one for each; train more shadow models"
        )
    spread = np.sqrt((squares if own else squares.sum()) / freedom)
    return mean, np.maximum(np.broadcast_to(spread, mean.shape), _SMALLEST_SPREAD)


def _own_spread(included: BoolArray, asked: bool | None, *, out_only: bool = False) -> bool:
    if asked is not None:
        return asked
    least = (~included).sum(0).min()
    return bool((least if out_only else min(least, included.sum(0).min())) >= ENOUGH_PER_RECORD)


def _require_models(side: str, mask: BoolArray) -> None:
    missing = int((mask.sum(0) == 0).sum())
    if missing:
        raise ValueError(
            f"expected a shadow model {side} each record; got none for {missing} of {mask.shape[1]} records; train more "
            "shadow models on a pool that holds all of them"
        )


def _log_normal(x: FloatArray, mean: FloatArray, spread: FloatArray) -> FloatArray:
    return -np.log(spread) - 0.5 * ((x - mean) / spread) ** 2


def _shadows(
    signals: FloatArray, shadow_signals: FloatArray, included: BoolArray
) -> tuple[FloatArray, FloatArray, BoolArray]:
    signals = _finite("signals", signals, 1)
    shadows = _finite("shadow_signals", shadow_signals, 2, len(signals))
    mask = np.asarray(included)
    if mask.dtype != np.bool_ or mask.shape != shadows.shape:
        raise ValueError(
            f"expected shadow_included as booleans of shape {shadows.shape}; got {mask.dtype} of shape {mask.shape}; "
            "pass one for each shadow score"
        )
    return signals, shadows, mask


def _finite(name: str, given: FloatArray, dims: int, records: int | None = None) -> FloatArray:
    array = np.asarray(given, dtype=np.float64)
    if array.ndim != dims or not array.size or (records is not None and array.shape[-1] != records):
        shape = f"{dims} dimensions" + ("" if records is None else f", the last of {records} records")
        raise ValueError(
            f"expected {name} of {shape}; got shape {array.shape}; pass one number for each record"
        )
    if not np.isfinite(array).all():
        raise ValueError(
            f"expected finite {name}; got {int((~np.isfinite(array)).sum())} that are not; leave such records out of "
            "both sets, or give their loss one large number"
        )
    return array
