# SPDX-License-Identifier: Apache-2.0
"""One sampled Gaussian step whose output the record moves besides, sampled or not: hidden feedback, step by step.

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

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from accountants.dots import FARTHEST, UNIT, Law, connect, crossing
from accountants.loss import Step

Array = NDArray[np.float64]

_MOST_NODES = 100_000
_ROUNDS = 60


def shifted_delta(step: Step, epsilon: float) -> float:
    """Return delta of one step at `epsilon`, the larger of both directions, rounded up."""
    at = np.array([float(epsilon)])
    return min(1.0, max(float(_above(step, removed, at)[0]) for removed in (True, False)))


def shifted_law(step: Step, removed: bool, mesh: float, ends: tuple[float, float]) -> Law:
    """Discretise one step between `ends`, as `dots` does; never below the truth."""
    below, above = max(1, math.ceil(-ends[0] / mesh)), max(1, math.ceil(ends[1] / mesh))
    up, down = mesh * np.arange(above + 1.0), mesh * np.arange(-below, 1.0)
    return connect(_above(step, removed, up), _below(step, removed, down), mesh)


def shifted_reach(step: Step, removed: bool, mass: float) -> tuple[float, float]:
    """Find the losses (low, high) outside of which the curve and its excess are at most `mass`."""
    high = crossing(lambda x: _above(step, removed, x), mass, 1)
    low = crossing(lambda x: _below(step, removed, -x), mass, 1)
    return -float(low[0]), float(high[0])


def shifted_nodes(step: Step, ends: tuple[float, float], removed: bool, count: int) -> tuple[Array, Array]:
    """Lay `count` nodes over the losses between `ends`, with the logarithms of their masses: roughly."""
    s, b = step.noise_multiplier, step.shift
    low, high = _position(step, np.array(ends if removed else (-ends[1], -ends[0])))
    x, pace = np.linspace(max(low, -14 * s), min(high, 1 + b + 40 * s), count, retstep=True)
    losses, _ = _loss(step, x)
    density = -x * x / (2 * s * s) - math.log(s * math.sqrt(2 * math.pi)) + math.log(float(pace))
    return (losses, density + losses) if removed else (-losses, density)


def shifted_log_moments(step: Step, orders: Array) -> Array:
    """Compute log A(a), the larger of both directions, from above: at most that of the unsampled Gaussian.

    By the trapezoidal rule: M has its zeros pi s^2 beside the real line (see `accountants.rdp`).
    """
    s, b = step.noise_multiplier, step.shift
    plain = orders * (orders - 1) / 2 * ((1 + b) / s) ** 2
    found = [max(_log_moment(step, float(a)), _log_moment(step, 1 - float(a))) for a in orders]
    return np.minimum(np.array(found), plain)


def _log_moment(step: Step, a: float) -> float:
    s, q, b = step.noise_multiplier, step.sampling_rate, step.shift
    middle, pace = (a - 1) * b, s * min(0.25, 2 * math.pi * min(math.pi * s, 6.0) / 40)
    # the exponent a moves the peak by something between 0 and a
    low, high = middle - 13 * s + min(a, 0.0), middle + 13 * s + max(a, 0.0)
    if (high - low) / pace > _MOST_NODES:
        return math.inf
    y = np.arange(low, high + pace, pace)
    logs = a * np.logaddexp(math.log1p(-q), math.log(q) + (y - 0.5) / s / s) - ((y - middle) / s) ** 2 / 2
    inner = float(np.logaddexp.reduce(logs)) + math.log(pace / s / math.sqrt(2 * math.pi))
    return a * (a - 1) / 2 * (b / s) ** 2 + inner + 1e-13 * (1 + abs(inner))


def _above(step: Step, removed: bool, losses: Array) -> Array:
    """The curve H at losses >= 0, rounded up."""
    if not removed:
        return np.exp(np.minimum(losses, FARTHEST)) * _below(step, True, -losses) * (1 + 4 * UNIT)
    s, q, b = step.noise_multiplier, step.sampling_rate, step.shift
    e = np.minimum(losses, FARTHEST)
    x = _position(step, e)
    first = np.logaddexp(math.log1p(-q) + log_ndtr((b - x) / s), math.log(q) + log_ndtr((1 + b - x) / s))
    return _difference(first, e + log_ndtr(-x / s), e)


def _below(step: Step, removed: bool, losses: Array) -> Array:
    """The excess H(e) - (1 - exp(e)) at losses <= 0, rounded up: exp(e) Q(< x) - P(< x) where the loss at x is e."""
    if not removed:
        return np.exp(losses) * _above(step, True, -losses) * (1 + 4 * UNIT)
    s, q, b = step.noise_multiplier, step.sampling_rate, step.shift
    e = np.maximum(losses, -FARTHEST)
    x = _position(step, e)
    second = np.logaddexp(math.log1p(-q) + log_ndtr((x - b) / s), math.log(q) + log_ndtr((x - 1 - b) / s))
    return _difference(e + log_ndtr(x / s), second, e)


def _difference(first: Array, second: Array, losses: Array) -> Array:
    """exp(first) - exp(second) >= 0, rounded up."""
    first, second = np.maximum(first, -740.0), np.maximum(second, -1480.0)
    share = -np.expm1(np.minimum(second - first, 0.0))
    slack = 16 * UNIT * (1 + np.abs(first) + np.abs(second) + 2 * np.abs(losses))
    return np.exp(first) * np.minimum(1.0, share + slack)


def _loss(step: Step, x: Array) -> tuple[Array, Array]:
    """The loss at x and its slope."""
    s, q, b = step.noise_multiplier, step.sampling_rate, step.shift
    y = (x - b - 0.5) / s / s
    stay, take = math.log1p(-q), math.log(q) + y
    rise = np.where(y < 1, np.log1p(q * np.expm1(np.minimum(y, 1.0))), np.logaddexp(stay, take))
    return b * (x - b / 2) / s / s + rise, (b + np.exp(np.minimum(take - rise, 0.0))) / s / s


def _position(step: Step, losses: Array) -> Array:
    """Invert the loss, by Newton from the right, where it is convex: each step stays there.

    H is the largest value of its expression over x, so that what is left of an error is of second order.
    """
    s, q, b = step.noise_multiplier, step.sampling_rate, step.shift
    # either term of the ratio alone reaches the loss further to the right
    staying = (losses - math.log1p(-q)) * s * s / b + b / 2
    taking = (losses - math.log(q)) * s * s / (1 + b) + (1 + b) / 2
    x = np.minimum(staying, taking)
    for _ in range(_ROUNDS):
        value, slope = _loss(step, x)
        change = np.maximum((value - losses) / slope, 0.0)
        x = x - change
        if np.all(change <= 1e-9 * (s + np.abs(x))):
            break
    return x
