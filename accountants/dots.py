# SPDX-License-Identifier: Apache-2.0
"""One step as a privacy-loss distribution on a grid, by connecting the dots: never below the truth.

With P the law of the output with the record and Q without it (or the other way round), the curve
H(e) = E_P[(1 - exp(e - L))_+], L = log dP/dQ, is convex in exp(e). The chords between its values on the grid
are the curve of a law on the grid, which therefore dominates (P, Q), and so do their compositions, even when
each step may look at the earlier outputs (Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022,
arXiv:2207.04380; Zhu, Dong, Wang 2022, arXiv:2106.08567, theorem 10). The error in epsilon is of second order
in the mesh.

For noise multiplier s = 1/mu and rate q, with D the curve of the Gaussian (`accountants.gaussian`) and
i(e) = log(1 + (exp(e) - 1)/q), removing a record has

    H(e) = q D(i(e))  for e >= 0,     H(e) - (1 - exp(e)) = (exp(e) - 1 + q) D(-i(e))  for e <= 0,

and adding one H(e) = 1 - exp(e) + exp(e) H_remove(-e). Above 0 the curve is kept, below 0 its excess over
1 - exp(e): both are small numbers known to all their digits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from accountants.loss import Step

Array = NDArray[np.float64]
Values = float | Array
Half = Callable[[Array], Array]
"""One half of a curve, at losses of one sign."""

UNIT = 2.0**-53
"""The relative rounding error of one float64 operation."""
FARTHEST = 650.0
"""The largest loss represented; exp() of it still leaves room for sums."""


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """Masses under P at the losses (first + i) * mesh, and the mass at infinity."""

    first: int
    masses: Array
    infinite: float


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


def connect(curve: Array, excess: Array, mesh: float) -> Law:
    """Connect the dots: `curve` at the losses 0, mesh, ... and `excess`, H - (1 - exp(e)), at ..., -mesh, 0."""
    below, above = len(excess) - 1, len(curve) - 1
    up, down = mesh * np.arange(above + 1.0), mesh * np.arange(-below, 1.0)
    # Both are H(0); the upper half may err upwards against the lower one, not the other way round.
    excess[-1] = max(curve[0], excess[-1])
    curve[0] = excess[-1] * (1 + 16 * UNIT)
    # The slope of a chord in exp(e) is the mass of Q above it; below 0 the `rest` is kept, 1 - slope.
    # Rounding may bend the chords the wrong way: straighten them from the top, which only raises the curve.
    slopes = np.append((curve[:-1] - curve[1:]) * np.exp(-up[:-1]) / math.expm1(mesh), 0.0)
    slopes = np.minimum(np.maximum.accumulate(slopes[::-1])[::-1], 1.0)
    rest = np.append((excess[1:] - excess[:-1]) * np.exp(-down[:-1]) / math.expm1(mesh), 1.0 - slopes[0])
    rest = np.maximum(np.minimum.accumulate(rest[::-1])[::-1], 0.0)
    middle = [rest[-1] - rest[-2] + 4 * UNIT]
    jumps = np.concatenate([np.diff(rest[:-1]), middle, slopes[:-1] - slopes[1:]])
    masses = np.append(0.0, jumps * np.exp(mesh * np.arange(1 - below, above + 1)))
    infinite = float(curve[-1])
    masses[0] = max(0.0, 1 - infinite - float(np.sum(masses))) + 64 * UNIT
    return Law(-below, masses * (1 + 8 * UNIT), infinite)


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


def crossing(curve: Callable[[Array], Array], mass: float, size: int) -> Array:
    """Find to 1 % from above the x > 0 where each falling `curve` reaches `mass`."""
    low, high = np.full(size, 1e-12), np.full(size, 2 * FARTHEST)
    while np.any(high > 1.01 * low):
        middle = np.sqrt(low * high)
        dear = curve(middle) > mass
        low, high = np.where(dear, middle, low), np.where(dear, high, middle)
    return high


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
