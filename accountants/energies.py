# SPDX-License-Identifier: Apache-2.0
"""Gaussians whose distance depends on how often a record took part, and chains that end in them.

The second leg of `accountants.feedback`, where W and the proofs stand: given its coins, all that a record moves is
dominated by a Gaussian of mu = sqrt(W) / s, and the coins have one law in D and D', so that delta is a mean over them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrc

from accountants.curve import Curve, rounded_up
from accountants.dots import FARTHEST, gaussian
from accountants.events import HiddenFeedback
from accountants.gaussian import smallest

Array = NDArray[np.float64]
Runs = tuple[tuple[HiddenFeedback, int], ...]
"""Steps with hidden feedback and their counts; equal ones share an error."""

_MOST_ENERGIES = 512
_PLACES, _LEVELS = 9, 3


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Gaussians of distance / noise `mu`, ascending, with their probabilities, rounded up."""

    mu: Array
    mass: Array

    def delta(self, epsilon: float) -> float:
        """Return E[delta of the Gaussian at `epsilon`], rounded up."""
        if epsilon > FARTHEST:  # the grid formula ends there; a smaller epsilon is the safe side
            epsilon = FARTHEST
        moved = self.mu > 0
        each = gaussian(1 / self.mu[moved], np.full(int(moved.sum()), float(epsilon)))[0]
        return min(1.0, float(self.mass[moved] @ each) * (1 + 1e-12))


def mixture(runs: Runs, whole: bool, replaced: bool) -> Mixture:
    """Find the law of sqrt(W) / s: of everything a record moves in `runs` (`whole`), or of what is fed back only.

    At most 512 values are kept, each rounded up to one that is.
    """
    energy, mass = np.zeros(1), np.ones(1)
    for leaf, count in runs:
        values, weights = _energies(leaf, count, whole, 2.0 if replaced else 1.0)
        energy = (energy[:, None] + values).ravel()
        mass = (mass[:, None] * weights).ravel()
        energy, mass = _merged(energy, mass)
    return Mixture(np.sqrt(energy) * (1 + 1e-12), mass * (1 + 1e-12))


def _energies(leaf: HiddenFeedback, steps: int, whole: bool, unit: float) -> tuple[Array, Array]:
    """The values of W / s^2 and their probabilities, K rounded up to a grid."""
    s, q = leaf.noise_multiplier, leaf.sampling_rate
    far = np.ceil(64 * 1.01 ** np.arange(math.ceil(math.log(max(steps / 64, 1.0)) / math.log(1.01))))
    k = np.unique(np.minimum(np.concatenate([np.arange(65.0), far, [float(steps)]]), steps))
    below, above = np.append(0.0, bdtr(k, steps, q)), np.append(1.0, bdtrc(k, steps, q))
    # from the nearer tail, so that small probabilities keep their digits
    mass = np.where(below[1:] < 0.5, np.diff(below), -np.diff(above)) * (1 + 1e-9)
    most, turns = 2 * leaf.feedback / s, k > 0  # a record that takes no turn moves nothing
    fed = np.where(turns, most * math.sqrt(steps), 0.0)
    if leaf.residual is not None:
        fed = np.minimum(fed, k * unit * leaf.residual / s)
    each = np.where(turns, k * (unit / s + most) ** 2 + (steps - k) * most**2, 0.0)
    energy = np.minimum((np.sqrt(k) * unit / s + fed) ** 2, each) if whole else fed**2
    return energy, np.maximum(mass, 0.0)


def _merged(energy: Array, mass: Array) -> tuple[Array, Array]:
    """Round the values up to at most 512 of a geometric grid, zero apart."""
    values, places = np.unique(energy, return_inverse=True)
    weights = np.bincount(places, mass).astype(np.float64)
    if len(values) <= _MOST_ENERGIES:
        return values, weights
    least = values[values > 0][0]
    grid = np.geomspace(max(least, values[-1] * 1e-9), values[-1], _MOST_ENERGIES - 1)
    grid[-1] = values[-1]
    grid = np.append(0.0, grid)
    merged = np.bincount(np.searchsorted(grid, values), weights, len(grid))
    return grid, merged.astype(np.float64)


def chained_delta(first: Curve, second: Mixture, epsilon: float, known: float) -> float:
    """Bound delta of the triangle at `epsilon`, over a few splits; `known` where none is better."""
    if math.isinf(epsilon):
        return known
    if first.delta(0.0) == 0:
        return min(known, second.delta(epsilon))

    def at(share: float) -> float:
        one, two = epsilon * share, epsilon * (1 - share) * (1 - 1e-15)
        d2 = second.delta(two)
        return 1.0 if d2 >= known else _total(one, two, first.delta(one), d2)

    return min(known, _least(at, 0.0, 1.0))


def chained_epsilon(first: Curve, second: Mixture, delta: float, known: float) -> float:
    """Bound epsilon of the triangle at `delta`, over a few splits of delta; `known` where none is better."""
    if first.epsilon(0.0) == 0:
        return min(known, smallest(lambda e: second.delta(e) <= delta, start=1.0))
    if delta < 1e-280:
        return known

    def at(log_depth: float) -> float:
        depth = math.exp(log_depth)
        e1 = first.epsilon(delta * math.exp(-depth))
        return math.inf if e1 >= known else e1 + _least_second(second, e1, depth, delta)

    deepest = min(known + 10, 300.0, 600 + math.log(delta))  # deeper, e2 alone would be above `known`
    return min(known, rounded_up(_least(at, math.log(0.05), math.log(max(deepest, 1.0)))))


def _least(value: Callable[[float], float], low: float, high: float) -> float:
    """Find about the least value between `low` and `high`: on a grid, then on finer ones around the best place."""
    best, middle, width = math.inf, (low + high) / 2, (high - low) / 2
    for _ in range(_LEVELS):
        places = np.linspace(max(low, middle - width), min(high, middle + width), _PLACES).tolist()
        found = [value(place) for place in places]
        i = int(np.argmin(found))
        best, middle, width = min(best, found[i]), places[i], 2 * width / (_PLACES - 1)
    return best


def _least_second(second: Mixture, e1: float, depth: float, delta: float) -> float:
    """Find the least e2 with which the triangle stays within `delta`; `inf` if there is none.

    With d1 = delta exp(-depth). The total is convex in exp(e2), so the e2 that do are an interval, which ends near
    `depth` at most.
    """

    def holds(e2: float) -> bool:
        return _total(e1, e2, delta * math.exp(-depth), second.delta(e2)) <= delta

    if holds(0.0):
        return 0.0
    high = next(
        (depth - gap for gap in (0.01, 0.1, 0.7, 1.5, 3.0) if depth > gap and holds(depth - gap)), None
    )
    if high is None:
        return math.inf
    low = 0.0
    while high - low > 1e-9 * high:
        half = (low + high) / 2
        low, high = (low, half) if holds(half) else (half, high)
    return high


def _total(e1: float, e2: float, d1: float, d2: float) -> float:
    """The delta of the triangle at e1 + e2, rounded up."""
    if max(e1, e2) > FARTHEST:
        return 1.0
    return min(1.0, max(d2 + math.exp(e2) * d1, d1 + math.exp(e1) * d2) * (1 + 1e-12))
