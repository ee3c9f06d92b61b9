# SPDX-License-Identifier: Apache-2.0
"""Sampled Gaussian steps whose output is moved by one of several distances: hidden feedback, and groups of records.

P = sum of w_j N(c_j, s^2) against Q = N(0, s^2), the c_j >= 0 and distinct. Every pair of a mixture of Gaussians on vectors of
norms at most c_j against the one at 0 is dominated by it: below, after the two cases.

**A group of k records**, each sampled by itself at rate q (`events.PoissonSampled`): c_j = j, w_j the binomial
probabilities. Let D' have k records that D lacks, and fix the coins of the others, which have one law for both (joint
convexity). D' then moves the mean by the sum of the contributions of those drawn, at most j for j of them
(Choquette-Choo, Ganesh, Steinke, Thakurta 2023, arXiv:2310.15526; Charles et al. 2024, arXiv:2407.07737). It falls when
records leave D or q or k fall, since thinning a sample mixes such pairs.

**A record that moves the output besides, sampled or not**: hidden feedback, step by step.

With noise s, rate q and shift b the pair is

    P = (1-q) N(b, s^2) + q N(1 + b, s^2)    against    Q = N(0, s^2).

**It dominates a step of `events.HiddenFeedback`** with b = 2 C2 / C1 (all lengths in C1). Let the record be in D' and
not in D (or contribute 0 there), and fix the coins of the others: they have one law for D and D', and mixing over
them costs nothing (joint convexity). Given the outputs so far, step t has the law N(m, s^2 I) under D, m
known. Under D' its own earlier coins are hidden: they have some posterior law; for each of their values the error is
known, feeds back m + b_t instead of m, |b_t| <= 2 C2 (two points of a ball of radius C2), and the coin of this
step is fresh: (1-q) N(m + b_t) + q N(m + b_t + a_t), |a_t| <= 1. So the ratio of the two laws is L = sum_j w_j X_j,
X_j = exp((c_j.x - |c_j|^2 / 2) / s^2), the centres c_j of norm <= b with weight 1-q and <= 1 + b with weight q.
Every divergence, in both directions, is E_Q of a convex function of L. Lognormals of mean 1: a sum is least in the
convex order below the sum of their comonotone copies, in which all c_j lie on one ray (Kaas, Dhaene, Goovaerts
2000, Insurance: Mathematics and Economics 27(2)). For such copies E(sum - d)_+ is the least sum of E(X_j - d_j)_+ over
sum d_j = d, so that it grows with each |c_j|, as every E(X_j - d_j)_+ does. That is the pair above;
pairs that dominate every step given the past dominate the composition (Zhu, Dong, Wang 2022, arXiv:2106.08567,
theorem 10), also where parameters follow the outputs (a filter may be fed with it).

It is below the unsampled Gaussian of distance 1 + b, since sampling mixes; and below any chain "amplified gradient,
then unamplified feedback", since it is the sampled pair moved by b. The reverse does not hold: nothing amplifies b
(test_the_amplified_charge_of_hidden_feedback_is_violated).

The loss l(x) = log dP/dQ is convex and increases through all real numbers. Moments of order a:

    E_Q[L^a] = exp(a (a-1) b^2 / (2 s^2)) E[M(y)^a],    y ~ N((a-1) b, s^2),    M(y) = 1 - q + q exp((2y-1) / (2 s^2)),

and for the other direction a becomes 1 - a.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from accountants.dominating_pairs.connect_the_dots import discretised, outside
from accountants.dominating_pairs.grid_law import FARTHEST, UNIT, Law
from accountants.dominating_pairs.renyi_moments import Line, Nodes, Part
from accountants.dominating_pairs.sampled_step import SHIFTED, Step

Array = NDArray[np.float64]

MOST_RECORDS = 64
"""The largest group whose centres are kept apart."""

_ROUNDS = 60
_WEIGHING = 1e-12  # relative: what is lost in the weights of a group


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """P = stay N(0) + sum of weights_j N(centres_j) against Q = N(0); `moved` is 1 - stay, to all its digits."""

    stay: float
    moved: float
    centres: Array
    weights: Array


@lru_cache(maxsize=4096)
def mixture(step: Step) -> Mixture:
    """The centres of one step, ascending, and how likely each is."""
    q, b, k = step.sampling_rate, step.shift, step.size
    if step.pair == SHIFTED:
        return Mixture(0.0, 1.0, np.array([b, 1 + b]), np.array([1 - q, q]))
    chosen = np.arange(1, k + 1)
    ways = np.array([math.log(math.comb(k, j)) for j in range(1, k + 1)])
    stay = k * math.log1p(-q)
    weights = np.exp(np.maximum(ways + chosen * math.log(q) + (k - chosen) * math.log1p(-q), -700.0))
    return Mixture(math.exp(stay), -math.expm1(stay), chosen.astype(np.float64), weights)


def shifted_mixed(step: Step) -> tuple[list[float], list[float]]:
    """Return how likely each distance between the two laws is, and the distances."""
    parts = mixture(step)
    return [parts.stay, *parts.weights.tolist()], [0.0, *parts.centres.tolist()]


def shifted_delta(step: Step, epsilon: float) -> float:
    """Return delta of one step at `epsilon`, the larger of both directions, rounded up."""
    at = np.array([float(epsilon)])
    return min(1.0, max(float(_above(step, removed, at)[0]) for removed in (True, False)))


def shifted_law(step: Step, removed: bool, mesh: float, ends: tuple[float, float]) -> Law:
    """Discretise one step between `ends`, as `dots` does; never below the truth."""
    return discretised(lambda x: _above(step, removed, x), lambda x: _below(step, removed, x), mesh, ends)


def shifted_reach(step: Step, removed: bool, mass: float) -> tuple[float, float]:
    """Find the losses (low, high) outside of which the curve and its excess are at most `mass`."""
    return outside(lambda x: _above(step, removed, x), lambda x: _below(step, removed, x), mass)


def shifted_nodes(step: Step, ends: tuple[float, float], removed: bool, count: int) -> tuple[Array, Array]:
    """Lay `count` nodes over the losses between `ends`, with the logarithms of their masses: roughly."""
    s, parts = step.noise_multiplier, mixture(step)
    low, high = _position(step, np.array(ends if removed else (-ends[1], -ends[0])))
    most = float(parts.centres[-1])
    x, pace = np.linspace(max(low, -14 * s), min(high, most + 40 * s), count, retstep=True)
    losses = _loss(s, parts.stay, parts.centres, parts.weights[:, None], x)
    density = -x * x / (2 * s * s) - math.log(s * math.sqrt(2 * math.pi)) + math.log(float(pace))
    return (losses, density + losses) if removed else (-losses, density)


def shifted_directions(steps: Sequence[Step]) -> list[list[Part]]:
    """What the moments of a few steps, alike but for noise and rate, are summed over: both directions."""
    parts = [mixture(step) for step in steps]
    noise = np.array([step.noise_multiplier for step in steps])[:, None]
    centres, weights = parts[0].centres, np.stack([part.weights for part in parts], axis=1)[:, :, None]

    def density(x: Array) -> Nodes:
        logs = -np.log(noise * math.sqrt(2 * math.pi)) - x * x / (2 * noise * noise)
        return _loss(noise, parts[0].stay, centres, weights, x), logs

    line = Line(density, noise, float(centres[-1]))
    return [[Part(lambda a: line.whole(0, a, 0.9), True)], [Part(lambda a: line.whole(-a, 1, 0.5), False)]]


def _above(step: Step, removed: bool, losses: Array) -> Array:
    """The curve H at losses >= 0, rounded up: with e = exp(loss), sum of weights_j Q(> x - c_j) - (e - stay) Q(> x)."""
    if not removed:
        return np.exp(np.minimum(losses, FARTHEST)) * _below(step, True, -losses) * (1 + 4 * UNIT)
    s, parts = step.noise_multiplier, mixture(step)
    e = np.minimum(losses, FARTHEST)
    x = _position(step, e)
    first = _log_sum(parts, lambda c: log_ndtr((c - x) / s))
    return _difference(first, np.log(_factor(parts, e)) + log_ndtr(-x / s), e)


def _below(step: Step, removed: bool, losses: Array) -> Array:
    """The excess H(e) - (1 - exp(e)) at losses <= 0, rounded up: exp(e) Q(< x) - P(< x) where the loss at x is e."""
    if not removed:
        return np.exp(losses) * _above(step, True, -losses) * (1 + 4 * UNIT)
    s, parts = step.noise_multiplier, mixture(step)
    e = np.maximum(losses, -FARTHEST)
    factor = _factor(parts, e)
    inside = factor > 0
    x = _position(step, np.where(inside, e, 0.0))
    below = log_ndtr(x / s)
    second = _log_sum(parts, lambda c: log_ndtr((x - c) / s))
    kept = _difference(np.log(np.where(inside, factor, 1.0)) + below, second, e)
    # the rounding error of the factor is relative to the terms that made it up
    lost = 8 * UNIT * np.where(e < -0.5, np.abs(factor) + 2 * parts.stay, parts.moved) * np.exp(below)
    return np.where(inside, kept + lost, 0.0)


def _factor(parts: Mixture, losses: Array) -> Array:
    """exp(loss) - stay."""
    far = np.exp(losses) - parts.stay
    return np.where(losses < -0.5, far, np.expm1(losses) + parts.moved)


def _log_sum(parts: Mixture, logs: Callable[[float], Array]) -> Array:
    """The logarithm of the sum of weights_j exp(logs(centre_j))."""
    terms = [
        math.log(w) + logs(c) for w, c in zip(parts.weights.tolist(), parts.centres.tolist(), strict=True)
    ]
    return np.logaddexp.reduce(terms, axis=0)


def _difference(first: Array, second: Array, losses: Array) -> Array:
    """exp(first) - exp(second) >= 0, rounded up; `first` and `second` are known to 1e-13 where sums of weights."""
    first, second = np.maximum(first, -740.0), np.maximum(second, -1480.0)
    share = -np.expm1(np.minimum(second - first, 0.0))
    slack = 16 * UNIT * (1 + np.abs(first) + np.abs(second) + 2 * np.abs(losses)) + _WEIGHING
    return np.exp(first) * np.minimum(1.0, share + slack)


def _loss(s: float | Array, stay: float, centres: Array, weights: Array, x: Array) -> Array:
    """The loss at x; `weights` holds one of each centre along its first axis."""
    terms = [c * (x - c / 2) / s / s for c in centres.tolist()]
    most = np.max(terms, axis=0)
    low = sum(w * np.expm1(np.minimum(t, 1.0)) for w, t in zip(weights, terms, strict=True))
    high = np.logaddexp.reduce([np.log(w) + t for w, t in zip(weights, terms, strict=True)], axis=0)
    if stay > 0:
        high = np.logaddexp(high, np.log1p(-np.sum(weights, axis=0)))
    # near 0 without cancellation; all terms are of weights that add up to 1
    near = most < 1 if stay > 0 else np.abs(most) < 1
    return np.where(near, np.log1p(np.where(near, low, 0.0)), high)


def _position(step: Step, losses: Array) -> Array:
    """Invert the loss: by Newton on the logarithm of what moves, from the right, where it is convex: each step stays there.

    H is the largest value of its expression over x, so that what is left of an error is of second order.
    """
    s, parts = step.noise_multiplier, mixture(step)
    target = np.log(np.maximum(_factor(parts, losses), 1e-300))
    logs, centres = np.log(parts.weights), parts.centres
    # any term alone reaches the target further to the right
    x = np.min([(target - w) * s * s / c + c / 2 for w, c in zip(logs, centres, strict=True)], axis=0)
    for _ in range(_ROUNDS):
        terms = np.array([w + c * (x - c / 2) / s / s for w, c in zip(logs, centres, strict=True)])
        value = np.logaddexp.reduce(terms, axis=0)
        slope = np.tensordot(centres, np.exp(terms - value), axes=1) / s / s
        change = np.maximum((value - target) / slope, 0.0)
        x = x - change
        if np.all(change <= 1e-9 * (s + np.abs(x))):
            break
    return x
