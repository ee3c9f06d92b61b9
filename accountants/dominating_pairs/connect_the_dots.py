# SPDX-License-Identifier: Apache-2.0
"""One step as a privacy-loss distribution on a grid, by connecting the dots: never below the truth.

With P the law of the output with the record and Q without it (or the other way round), the curve
H(e) = E_P[(1 - exp(e - L))_+], L = log dP/dQ, is convex in exp(e). The chords between its values on the grid
are the curve of a law on the grid, which therefore dominates (P, Q), and so do their compositions, even when
each step may look at the earlier outputs (Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022,
arXiv:2207.04380; Zhu, Dong, Wang 2022, arXiv:2106.08567, theorem 10). The error in epsilon is of second order
in the mesh.

For noise multiplier s = 1/mu and rate q, with D the curve of the Gaussian (`accountants.dominating_pairs.gaussian`) and
i(e) = log(1 + (exp(e) - 1)/q), removing a record has

    H(e) = q D(i(e))  for e >= 0,     H(e) - (1 - exp(e)) = (exp(e) - 1 + q) D(-i(e))  for e <= 0,

and adding one H(e) = 1 - exp(e) + exp(e) H_remove(-e). Above 0 the curve is kept, below 0 its excess over
1 - exp(e): both are small numbers known to all their digits.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import log_ndtr

from accountants.dominating_pairs.grid_law import FARTHEST, UNIT, Array, Law, connect, crossing
from accountants.dominating_pairs.sampled_step import Step

Values = float | Array
Half = Callable[[Array], Array]
"""One half of a curve, at losses of one sign."""


def dots(step: Step, removed: bool, mesh: float, ends: tuple[float, float]) -> Law:
    """Discretise one step between `ends` (low < 0 < high); what lies below low is counted at low.

    Args:
        step: noise multiplier and sampling rate.
        removed: whether the record leaves (else it joins).
        mesh: the distance of the grid points, with so few binary digits that its multiples are exact.
        ends: as given by `reach`.

    Guarantees:
        - pessimistic: the curve of the result is nowhere below that of the step, rounding errors included.
    """
    s, q = step.noise_multiplier, step.sampling_rate
    return discretised(lambda x: _above(s, q, removed, x), lambda x: _below(s, q, removed, x), mesh, ends)


def discretised(above: Half, below: Half, mesh: float, ends: tuple[float, float]) -> Law:
    """Connect the dots between `ends` of a curve given by its halves: H(e) at e >= 0, H(e) - (1 - exp(e)) at e <= 0."""
    num_below, num_above = max(1, math.ceil(-ends[0] / mesh)), max(1, math.ceil(ends[1] / mesh))
    up, down = mesh * np.arange(num_above + 1.0), mesh * np.arange(-num_below, 1.0)
    return connect(above(up), below(down), mesh)


def outside(above: Half, below: Half, mass: float) -> tuple[float, float]:
    """Find the losses (low, high) outside of which both halves of one step's curve are at most `mass`."""
    return -float(crossing(lambda x: below(-x), mass, 1)[0]), float(crossing(above, mass, 1)[0])


def reach(steps: Sequence[Step], removed: bool, mass: float) -> list[tuple[float, float]]:
    """Find for each step the losses (low, high) outside of which the curve and its excess are at most `mass`."""
    s = np.array([step.noise_multiplier for step in steps])
    q = np.array([step.sampling_rate for step in steps])
    with np.errstate(divide="ignore"):
        edge = -np.log1p(-q)
    high = crossing(lambda x: _above(s, q, removed, x), mass, len(steps))
    low = crossing(lambda x: _below(s, q, removed, -x), mass, len(steps))
    low, high = (np.minimum(low, edge), high) if removed else (low, np.minimum(high, edge))
    return list(zip((-low).tolist(), high.tolist(), strict=True))


def _above(s: Values, q: Values, removed: bool, losses: Array) -> Array:
    """The curve H at losses >= 0, rounded up."""
    if removed:
        return q * gaussian(s, inner(q, losses)[0])[0]
    return np.exp(np.minimum(losses, FARTHEST)) * _below(s, q, True, -losses)


def _below(s: Values, q: Values, removed: bool, losses: Array) -> Array:
    """The excess H(e) - (1 - exp(e)) at losses <= 0, rounded up."""
    if not removed:
        return np.exp(losses) * _above(s, q, True, -losses)
    before, factor = inner(q, losses)
    inside = factor > 0
    value, ceiling, _ = gaussian(s, np.where(inside, -before, 0.0))
    return np.where(inside, factor * value + 8 * UNIT * rounded(q, losses, factor) * ceiling, 0.0)


def rounded(q: Values, losses: Array, factor: Array) -> Array:
    """The larger of the two terms that made up `factor`: what its rounding error is relative to."""
    return np.where(losses < -0.5, factor + 2 * (1 - q), q)


def inner(q: Values, losses: Array) -> tuple[Array, Array]:
    """Compute i(e), the loss of the Gaussian before sampling, and exp(e) - 1 + q (for e <= 1)."""
    low, near, far = np.minimum(losses, -0.5), np.clip(losses, -0.5, 1.0), np.maximum(losses, 1.0)
    factor = np.where(losses < -0.5, np.exp(low) - (1 - q), np.expm1(near) + q)
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.where(losses < -0.5, np.log(np.maximum(factor, 0) / q), np.log1p(np.expm1(near) / q))
    return np.where(losses > 1, far - np.log(q) + np.log1p(-(1 - q) * np.exp(-far)), loss), factor


def gaussian(s: Values, losses: Array) -> tuple[Array, Array, Array]:
    """Compute the curve D of the Gaussian at losses >= 0, rounded up, its first term, and twice what was added."""
    mu = 1 / s
    upper = np.maximum(log_ndtr(mu / 2 - losses / mu), -740.0)
    lower = log_ndtr(-mu / 2 - losses / mu) + losses
    share = -np.expm1(np.minimum(lower - upper, 0.0))
    slack = 16 * UNIT * (1 + np.abs(np.maximum(lower, -740.0)) + np.abs(upper) + 2 * losses)
    ceiling = np.exp(upper)
    return ceiling * np.minimum(1.0, share + slack), ceiling, 2 * ceiling * slack
