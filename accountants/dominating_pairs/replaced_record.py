# SPDX-License-Identifier: Apache-2.0
"""One Gaussian step on a sample when one record is *replaced* by another: its curve and its Renyi moments.

Contributions have norm <= 1, the noise is s, q is the rate. P is the law with the one record, Q with the other.

Poisson sample. For each choice of the other records, P = (1-q) N(0) + q N(g), Q = (1-q) N(0) + q N(g').
With E = exp(e) >= 1, A = 1 + (E-1)/q, b = E/A, advanced joint convexity (Balle, Barthe, Gaboardi 2018,
arXiv:1807.01647, theorem 2; an equality here) gives H(e) = q H_A(N(g) || (1-b) N(0) + b N(g')). The centres lie
within 1 and 2 of g, and E f(sum of p_i exp(X_i - var X_i / 2)), f convex, X Gaussian, grows with each covariance
of X (Kahane's convexity inequality, 1986): the worst is g' = -g with |g| = 1, on a line, and Q mirrors P:

    P = (1-q) N(0, s^2) + q N(1, s^2),    Q = (1-q) N(0, s^2) + q N(-1, s^2).

Fixed size. A sample without the record is one with it in which it was swapped for another, all of norm <= 1: all
centres lie within 2, hence H(e) = q D(log A) for e >= 0, D the curve of the Gaussian at distance 2 (there, for
sampling without replacement under substitution). Replacing is symmetric, so H(-e) = 1 - exp(-e) + exp(-e) H(e) bounds the other half; the two halves
meet convexly and are the curve of a pair, which dominates every step and so the composition (Zhu, Dong, Wang 2022,
arXiv:2106.08567, theorem 10).

For any symmetric pair the Renyi moment needs the upper half only: with l the loss,

    A(a) - 1 = a (a-1) integral over t > 0 of (exp((a-1) t) + exp(-a t)) H(t) dt
             = E_Q [h_a(l) + h_(1-a)(l); l > 0]

in the notation of `accountants.dominating_pairs.renyi_moments`; for the fixed size E_Q is over the pair (1-q) N(0) + q N(2) against N(0).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from accountants.dominating_pairs.connect_the_dots import discretised, gaussian, inner, outside
from accountants.dominating_pairs.grid_law import FARTHEST, UNIT, Law
from accountants.dominating_pairs.renyi_moments import Line, Nodes, Part
from accountants.dominating_pairs.sampled_step import FIXED, Step, sampled_density, sampled_loss

Array = NDArray[np.float64]


def swapped_curve(step: Step, losses: Array) -> Array:
    """Compute the curve H of one step with a record replaced, at losses >= 0, rounded up."""
    s, q = step.noise_multiplier, step.sampling_rate
    return q * gaussian(s / 2, inner(q, losses)[0])[0] if step.pair == FIXED else _poisson(s, q, losses)


def _poisson(s: float, q: float, losses: Array) -> Array:
    """The curve of the pair (1-q) N(0) + q N(+-1): P(> x) - exp(e) Q(> x) where the loss at x is e."""
    e = np.minimum(losses, FARTHEST)
    half = (1 - q) * -np.expm1(-e)
    root = half + np.hypot(half, 2 * q * np.exp(-e / 2 - min(0.5 / s / s, 700.0)))
    # The curve is the maximum over x, so that an error of x is of second order.
    with np.errstate(divide="ignore"):
        x = np.where(e > 0, s * s * (e + np.log(root) - math.log(2 * q)) + 0.5, 0.0)
        grown = np.log(np.expm1(np.minimum(e, 1.0)))
        grown = np.where(e > 1, e + np.log1p(-np.exp(-np.maximum(e, 1.0))), grown)
    first = np.maximum(math.log(q) + log_ndtr((1 - x) / s), -740.0)
    second = math.log(q) + e + log_ndtr(-(1 + x) / s)
    third = math.log1p(-q) + grown + log_ndtr(-x / s)
    share = 1 - np.exp(np.minimum(second - first, 0.0)) - np.exp(np.minimum(third - first, 0.0))
    sizes = np.abs(first) + np.abs(np.maximum(second, -740.0)) + np.abs(np.maximum(third, -740.0))
    slack = 16 * UNIT * (1 + sizes + 2 * e)
    return np.exp(first) * np.clip(share + slack, 0.0, 1.0)


def _mirrored(step: Step, losses: Array) -> Array:
    """The excess H(e) - (1 - exp(e)) at losses <= 0, rounded up."""
    return np.exp(losses) * swapped_curve(step, -losses) * (1 + 4 * UNIT)


def swapped_delta(step: Step, epsilon: float) -> float:
    """Return delta of one step with a record replaced at `epsilon`, rounded up."""
    return min(1.0, float(swapped_curve(step, np.array([epsilon]))[0]))


def swapped_law(step: Step, mesh: float, ends: tuple[float, float]) -> Law:
    """Discretise one step between `ends`, as `dots` does; never below the truth."""
    return discretised(lambda x: swapped_curve(step, x), lambda x: _mirrored(step, x), mesh, ends)


def swapped_reach(step: Step, mass: float) -> tuple[float, float]:
    """Find the losses (low, high) outside of which the curve and its excess are at most `mass`."""
    return outside(lambda x: swapped_curve(step, x), lambda x: _mirrored(step, x), mass)


def swapped_directions(steps: Sequence[Step]) -> list[list[Part]]:
    """What the moments of a few steps of one kind are summed over; one direction, since the other is alike."""
    noise = np.array([step.noise_multiplier for step in steps])[:, None]
    rate = np.array([step.sampling_rate for step in steps])[:, None]
    if steps[0].pair == FIXED:
        half = Line(lambda x: sampled_density(noise / 2, rate, x), noise / 2, reach=1.0, left=0.5)
        return [[Part(half.half, True), Part(half.half, False)]]

    def density(x: Array) -> Nodes:
        fall, logs = sampled_density(noise, rate, -x)
        return sampled_loss(noise, rate, x) - fall, logs + fall

    line = Line(density, noise, reach=2.0, left=-1.0)
    return [[Part(lambda a: line.whole(0, a, 0.5), True)]]


def swapped_nodes(step: Step, ends: tuple[float, float], count: int) -> tuple[Array, Array]:
    """Lay `count` nodes over the losses between `ends`, with the logarithms of their P-masses: roughly."""
    fixed, q = step.pair == FIXED, step.sampling_rate
    s = step.noise_multiplier / 2 if fixed else step.noise_multiplier
    x, pace = np.linspace(0.5 if fixed else 0.0, 1.5 + 30 * s, count // 2, retstep=True)
    fall, logs = (np.zeros(1), sampled_density(s, q, x)[1]) if fixed else sampled_density(s, q, -x)
    side = sampled_loss(s, q, x) - fall, logs + fall + math.log(float(pace))
    return mirrored_nodes(side, side, ends)


def mirrored_nodes(above: Nodes, below: Nodes, ends: tuple[float, float]) -> tuple[Array, Array]:
    """Put losses > 0 of P against Q beside mirrored ones of Q against P, each with log masses of the second law.

    Returns losses, those not between `ends` made nothing of, and log masses of P.
    """
    losses = np.concatenate([-below[0][::-1], above[0]])
    weights = np.concatenate([below[1][::-1], above[1] + above[0]])
    outside = (losses < ends[0]) | (losses > ends[1])
    return np.where(outside, 0.0, losses), np.where(outside, -700.0, weights)
