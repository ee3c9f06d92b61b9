# SPDX-License-Identifier: Apache-2.0
"""The Renyi divergences of steps, at fixed orders: computed for many at once, kept, and added up.

Beside the integrals of `accountants.dominating_pairs.renyi_moments` stand bounds that need none, for noise so small or orders so large that an
integral is no use. With mu the distance of the centres over the noise, a pair that mixes Gaussian ones has A(a) of at most the
mean of exp(a (a-1) mu^2 / 2) (joint convexity); and for one record there or not, by Minkowski's inequality, the norm of
the likelihood ratio is at most the mean of the norms: log A(a) <= a log(1 - q + q exp((a-1) / (2 s^2))). A record
replaced under a fixed size has both halves of that pair at half the noise: A - 1 is at most twice as large.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from accountants.dominating_pairs.kinds import KINDS
from accountants.dominating_pairs.renyi_moments import least_like, log_moments
from accountants.dominating_pairs.sampled_step import FIXED, ONE, Step
from accountants.events import Gaussian, NonPrivate
from accountants.relations import Pair, Pairs, as_step

Array = NDArray[np.float64]

_SLACK = 1e-9  # relative; covers the quadrature (1e-11)
_TOGETHER = 16
_MOST_KNOWN = 20_000
_KNOWN: dict[Pair, Array] = {}


def _grid() -> Array:
    near_one = 1 + np.array([0.001, 0.002, 0.003, 0.005, 0.007, *(x / 100 for x in range(1, 11))])
    tenths, twentieths = 1 + np.arange(2, 100) / 10, np.arange(23, 60, 2) / 20
    dense = np.round(64 * 2 ** (np.arange(0, 43) / 14))
    sparse = np.round(512 * 2 ** (np.arange(0, 17) / 4))
    integers = np.concatenate([np.arange(2.0, 65), [128, 256], dense, sparse])
    return np.unique(np.concatenate([near_one, tenths, twentieths, integers]).round(6))


ORDERS: Array = _grid()
"""The orders of every Renyi curve: 1.001 to 10.9 in small steps, then integers up to 8192."""
ORDERS.flags.writeable = False


def total_divergences(pairs: Pairs) -> Array:
    """Return the Renyi divergences of a composition of counted pairs at `ORDERS`, rounded up."""
    total = np.zeros_like(ORDERS)
    if pairs:
        rows = divergences([pair for pair, _ in pairs])
        with np.errstate(over="ignore"):
            for row, (_, count) in zip(rows, pairs, strict=True):
                total += row * count
    return total


def renyi(pair: Pair) -> Array:
    """Return the Renyi divergences of one `pair` at `ORDERS`, rounded up; read-only."""
    return divergences([pair])[0]


def divergences(pairs: Sequence[Pair]) -> list[Array]:
    """Return the Renyi divergences of each of `pairs` at `ORDERS`, rounded up; read-only."""
    if len(_KNOWN) > _MOST_KNOWN:
        _KNOWN.clear()
    missing = sorted({pair for pair in pairs if pair not in _KNOWN}, key=_likeness)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        for _, alike in itertools.groupby(missing, key=_likeness):
            group = list(alike)
            for some in _together(group):
                for pair, row in zip(some, _rows(some), strict=True):
                    row.flags.writeable = False
                    _KNOWN[pair] = row
    return [_KNOWN[pair] for pair in pairs]


def _together(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Cut alike pairs into such numbers as do not take too much memory: less noise, longer lines."""
    least = _likeness(pairs[0])[3]
    most = _TOGETHER if least == 0 else max(1, min(_TOGETHER, int(2 * _TOGETHER * least)))
    for start in range(0, len(pairs), most):
        yield pairs[start : start + most]


def _likeness(pair: Pair) -> tuple[str, float, int, float]:
    """What the pairs that are computed together have in common."""
    if isinstance(pair, NonPrivate):
        return "none", 0.0, 0, 0.0
    if isinstance(pair, Gaussian):
        return "plain", 0.0, 0, 0.0
    step = as_step(pair)
    return step.pair, step.shift, step.size, least_like(step.noise_multiplier)


def _rows(pairs: Sequence[Pair]) -> list[Array]:
    first = pairs[0]
    if isinstance(first, NonPrivate):
        return [np.full_like(ORDERS, np.inf) for _ in pairs]
    if isinstance(first, Gaussian):
        return [_plain(p.noise_multiplier) * (1 + _SLACK) for p in pairs if isinstance(p, Gaussian)]
    steps = [as_step(pair) for pair in pairs]
    kind = KINDS[steps[0].pair]
    known = np.array([_by_convexity(step) for step in steps])
    if steps[0].pair in (ONE, FIXED):
        known = np.minimum(known, [_by_norm(step) for step in steps])
    unit = least_like(steps[0].noise_multiplier) / max(kind.mixed(steps[0])[1])
    return list(log_moments(kind.directions(steps), ORDERS, known, unit) * (1 + _SLACK) / (ORDERS - 1))


def _plain(noise_multiplier: float) -> Array:
    """The divergences of the Gaussian."""
    mu = 1 / noise_multiplier if noise_multiplier else math.inf
    return ORDERS / 2 * mu * mu


def _by_convexity(step: Step) -> Array:
    weights, distances = KINDS[step.pair].mixed(step)
    mu = np.array(distances) / step.noise_multiplier
    return _log_mean(np.array(weights), (ORDERS * (ORDERS - 1) / 2)[:, None] * mu * mu)


def _by_norm(step: Step) -> Array:
    fixed, q = step.pair == FIXED, step.sampling_rate
    mu = (2 if fixed else 1) / step.noise_multiplier
    one = ORDERS * _log_mean(np.array([q]), ((ORDERS - 1) / 2)[:, None] * mu * mu)
    return one + np.log1p(-np.expm1(-one)) if fixed else one


def _log_mean(weights: Array, exponents: Array) -> Array:
    """Compute log(1 + sum of weights (exp(exponents) - 1)) along rows: small ones to all their digits."""
    near = np.log1p(np.expm1(np.minimum(exponents, 1.0)) @ weights)
    left = np.log(max(0.0, 1 - float(np.sum(weights))))
    far = np.logaddexp(left, np.logaddexp.reduce(np.log(weights) + exponents, axis=1))
    return np.where(np.max(exponents, axis=1) < 1, near, far)
