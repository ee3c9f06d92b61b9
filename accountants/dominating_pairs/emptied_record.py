# SPDX-License-Identifier: Apache-2.0
"""One Gaussian step on a sample of fixed size when one record is *emptied*: it is drawn as before and adds nothing.

D has a record that adds g, |g| <= 1; in D' it adds 0. A sample of b of the n records without it is one of b - 1 with another
record t put in its place, evenly chosen; so both laws draw b - 1 others, S, and, given S, with q = b / n,

    P = (1-q) mean_t N(f(S) + g_t) + q N(f(S) + g),    Q = (1-q) mean_t N(f(S) + g_t) + q N(f(S)),    |g_t| <= 1.

S has one law for both: it costs nothing (joint convexity); take f(S) = 0. With E = exp(e) >= 1, A = 1 + (E-1)/q, c = E/A,
advanced joint convexity (Balle, Barthe, Gaboardi 2018, arXiv:1807.01647, theorem 2) gives

    H(e) = q H_A(N(g) || (1-c) mean_t N(g_t) + c N(0)),    and in reverse    q H_A(N(0) || (1-c) mean_t N(g_t) + c N(g)).

Each is E f(sum of p_i exp(X_i - var X_i / 2)), f convex, X Gaussian, with the covariances of the centres as seen from the first
law's; it grows with each of them (Kahane's convexity inequality, 1986). Seen from g, the g_t lie within 2 and 0 within 1:
all covariances are largest where g_t = -g, |g| = 1. Seen from 0 the g_t and g lie within 1: where g_t = g. So, on a line,

    e >= 0:  H is that of (1-q) N(0) + q N(2) against (1-q) N(0) + q N(1);
    in reverse, e >= 0:  q D(log A), D the curve of the Gaussian at distance 1.

H(-e) = 1 - exp(-e) + exp(-e) (that in reverse at e): both halves are the largest values over all pairs, which are convex in
exp(e) and meet at 0, and so the curve of a pair, which dominates every step and the composition (Zhu, Dong, Wang 2022,
arXiv:2106.08567, theorem 10). For much noise the price is that of a Poisson sample, half of that for a record replaced.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from accountants.dominating_pairs.connect_the_dots import discretised, gaussian, inner, outside
from accountants.dominating_pairs.grid_law import FARTHEST, UNIT, Law
from accountants.dominating_pairs.renyi_moments import Line, Nodes, Part
from accountants.dominating_pairs.replaced_record import mirrored_nodes
from accountants.dominating_pairs.sampled_step import Step, sampled_density, sampled_loss

Array = NDArray[np.float64]


def emptied_curve(step: Step, full: bool, losses: Array) -> Array:
    """Compute the curve H at losses >= 0, rounded up: of the law with the full record (`full`), or of the other one."""
    s, q = step.noise_multiplier, step.sampling_rate
    if not full:
        return q * gaussian(s, inner(q, losses)[0])[0]
    e = np.minimum(losses, FARTHEST)
    # The curve is the maximum over x, so that an error of x is of second order.
    root = np.sqrt(1 - 4 * (1 - q) / q * np.exp(-e - min(1 / s / s, 700.0)) * np.expm1(-e))
    x = s * s * (e + np.log1p(root) - math.log(2)) + 1.5
    with np.errstate(divide="ignore"):
        grown = np.log(np.expm1(np.minimum(e, 1.0)))
    grown = np.where(e > 1, e + np.log1p(-np.exp(-np.maximum(e, 1.0))), grown)
    first = np.maximum(math.log(q) + log_ndtr((2 - x) / s), -740.0)
    second = math.log(q) + e + log_ndtr((1 - x) / s)
    third = math.log1p(-q) + grown + log_ndtr(-x / s)
    share = 1 - np.exp(np.minimum(second - first, 0.0)) - np.exp(np.minimum(third - first, 0.0))
    sizes = np.abs(first) + np.abs(np.maximum(second, -740.0)) + np.abs(np.maximum(third, -740.0))
    slack = 16 * UNIT * (1 + sizes + 2 * e)
    return np.exp(first) * np.clip(share + slack, 0.0, 1.0)


def _mirrored(step: Step, full: bool, losses: Array) -> Array:
    """The excess H(e) - (1 - exp(e)) at losses <= 0, rounded up."""
    return np.exp(losses) * emptied_curve(step, not full, -losses) * (1 + 4 * UNIT)


def emptied_delta(step: Step, epsilon: float) -> float:
    """Return delta of one step with a record emptied at `epsilon`, the larger of both directions, rounded up."""
    at = np.array([epsilon])
    return min(1.0, max(float(emptied_curve(step, full, at)[0]) for full in (True, False)))


def emptied_law(step: Step, full: bool, mesh: float, ends: tuple[float, float]) -> Law:
    """Discretise one step between `ends`, as `dots` does; never below the truth."""
    return discretised(lambda x: emptied_curve(step, full, x), lambda x: _mirrored(step, full, x), mesh, ends)


def emptied_reach(step: Step, full: bool, mass: float) -> tuple[float, float]:
    """Find the losses (low, high) outside of which the curve and its excess are at most `mass`."""
    return outside(lambda x: emptied_curve(step, full, x), lambda x: _mirrored(step, full, x), mass)


def emptied_nodes(step: Step, ends: tuple[float, float], full: bool, count: int) -> tuple[Array, Array]:
    """Lay `count` nodes over the losses between `ends`, with the logarithms of their P-masses: roughly."""
    s, q = step.noise_multiplier, step.sampling_rate
    sides = []
    for density, left in ((_two_centres, 1.5), (sampled_density, 0.5)):
        x, pace = np.linspace(left, left + 1 + 30 * s, count // 2, retstep=True)
        losses, logs = density(s, q, x)
        sides.append((losses, logs + math.log(float(pace))))
    above, below = sides if full else sides[::-1]
    return mirrored_nodes(above, below, ends)


def emptied_directions(steps: Sequence[Step]) -> list[list[Part]]:
    """What the moments of a few steps are summed over, in both directions: each takes its halves from two pairs."""
    noise = np.array([step.noise_multiplier for step in steps])[:, None]
    rate = np.array([step.sampling_rate for step in steps])[:, None]
    above = Line(lambda x: _two_centres(noise, rate, x), noise, reach=2.0, left=1.5)
    below = Line(lambda x: sampled_density(noise, rate, x), noise, reach=1.0, left=0.5)
    return [
        [Part(one.half, True), Part(other.half, False)] for one, other in ((above, below), (below, above))
    ]


def _two_centres(s: float | Array, q: float | Array, x: Array) -> Nodes:
    """Losses and log density of Q of (1-q) N(0) + q N(2) against (1-q) N(0) + q N(1)."""
    one, logs = sampled_density(s, q, x)
    return np.maximum(sampled_loss(s, q, 2 * x - 1.5) - one, 0.0), logs + one
