# SPDX-License-Identifier: Apache-2.0
"""Gaussians whose distance depends on how often a record took part, and chains with them as a leg.

A leg of the chains of `accountants.methods.hidden_feedback`, where W and the proofs stand: given its coins, all that a record moves is
dominated by a Gaussian of mu = sqrt(W) / s, and the coins have one law at both ends, so that delta is a mean over them.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, bdtrc

from accountants.curve import Curve, rounded_up
from accountants.dominating_pairs.connect_the_dots import gaussian
from accountants.dominating_pairs.gaussian import smallest
from accountants.dominating_pairs.grid_law import FARTHEST
from accountants.events import HiddenFeedback

Array = NDArray[np.float64]
Runs = tuple[tuple[HiddenFeedback, int], ...]
"""Steps with hidden feedback and their counts."""

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


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """From D to D' by way of others: `first`, then `second`; where `around`, `second` once before `first` too."""

    first: Curve
    second: Mixture
    around: bool = False


def mixture(runs: Runs, whole: bool, replaced: bool) -> Mixture:
    """Find the law of sqrt(W) / s: of everything a record moves in `runs` (`whole`), or of what is fed back only.

    `replaced`: between two records, else between one and none. At most 512 values are kept, each rounded up to one
    that is.
    """
    energy, mass = np.zeros(1), np.ones(1)
    pools = _pools(runs)
    several = sum(leaf.residual is None for leaf in pools) > 1
    for leaf, rates in pools.items():
        values, weights = _energies(leaf, rates, whole, 2.0 if replaced else 1.0, several)
        energy = (energy[:, None] + values).ravel()
        mass = (mass[:, None] * weights).ravel()
        energy, mass = _merged(energy, mass)
    return Mixture(np.sqrt(energy) * (1 + 1e-12), mass * (1 + 1e-12))


def _pools(runs: Runs) -> dict[HiddenFeedback, list[tuple[float, int]]]:
    """Rates and counts of the steps that may share an error: equal but for their rates."""
    pools: defaultdict[HiddenFeedback, list[tuple[float, int]]] = defaultdict(list)
    for leaf, count in runs:
        pools[replace(leaf, sampling_rate=1.0)].append((leaf.sampling_rate, count))
    return pools


def _energies(
    leaf: HiddenFeedback, rates: Sequence[tuple[float, int]], whole: bool, unit: float, several: bool
) -> tuple[Array, Array]:
    """The values of W / s^2 and their probabilities; `several`: an unbounded error may come from other steps."""
    s, steps = leaf.noise_multiplier, sum(count for _, count in rates)
    k, mass = _turns(*rates[0])
    for rate, count in rates[1:]:
        more, weights = _turns(rate, count)
        k, mass = _merged((k[:, None] + more).ravel(), (mass[:, None] * weights).ravel())
    most = 2 * leaf.feedback / s
    # a record that has taken no turn moves nothing
    moves = (k > 0) | (several and leaf.residual is None)
    fed = np.where(moves, most * math.sqrt(steps), 0.0)
    if leaf.residual is not None:
        fed = np.minimum(fed, k * unit * leaf.residual / s)
    each = np.where(moves, k * (unit / s + most) ** 2 + (steps - k) * most**2, 0.0)
    energy = np.minimum((np.sqrt(k) * unit / s + fed) ** 2, each) if whole else fed**2
    return energy, mass


def _turns(q: float, steps: int) -> tuple[Array, Array]:
    """The values of K and their probabilities, rounded up to a grid."""
    far = np.ceil(64 * 1.01 ** np.arange(math.ceil(math.log(max(steps / 64, 1.0)) / math.log(1.01))))
    k = np.unique(np.minimum(np.concatenate([np.arange(65.0), far, [float(steps)]]), steps))
    below, above = np.append(0.0, bdtr(k, steps, q)), np.append(1.0, bdtrc(k, steps, q))
    # from the nearer tail, so that small probabilities keep their digits
    mass = np.where(below[1:] < 0.5, np.diff(below), -np.diff(above)) * (1 + 1e-9)
    return k, np.maximum(mass, 0.0)


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


def chained_delta(chain: Chain, epsilon: float, known: float) -> float:
    """Bound delta of `chain` at `epsilon`, over a few splits; `known` where none is better."""
    first, second, around = chain.first, chain.second, chain.around
    if math.isinf(epsilon):
        return known
    if not around and first.delta(0.0) == 0:
        return min(known, second.delta(epsilon))

    def at(share: float) -> float:
        one, two = epsilon * share, epsilon * (1 - share) / (1 + around) * (1 - 1e-15)
        d2 = second.delta(two)
        return 1.0 if d2 >= known else _total(one, two, first.delta(one), d2, around)

    return min(known, _least(at, 0.0, 1.0))


def chained_epsilon(chain: Chain, delta: float, known: float) -> float:
    """Bound epsilon of `chain` at `delta`, over a few splits of delta; `known` where none is better."""
    first, second, around = chain.first, chain.second, chain.around
    if not around and first.epsilon(0.0) == 0:
        return min(known, smallest(lambda e: second.delta(e) <= delta, start=1.0))
    if delta < 1e-280:
        return known

    def at(log_depth: float) -> float:
        depth = math.exp(log_depth)
        e1 = first.epsilon(delta * math.exp(-depth))
        return math.inf if e1 >= known else e1 + (1 + around) * _least_second(chain, e1, depth, delta)

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


def _least_second(chain: Chain, e1: float, depth: float, delta: float) -> float:
    """Find about the least e2 with which the chain stays within `delta`; `inf` if none is found.

    With d1 = delta exp(-depth), so that e2 is `depth` at most. Without `around` the total is convex in exp(e2), and the
    e2 that do are an interval; with it the search may miss one, but what it returns has been checked.
    """

    def holds(e2: float) -> bool:
        return _total(e1, e2, delta * math.exp(-depth), chain.second.delta(e2), chain.around) <= delta

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


def _total(e1: float, e2: float, d1: float, d2: float, around: bool) -> float:
    """The delta of the chain at e1 + e2, or at e1 + 2 e2 (`around`), rounded up."""
    if e1 + e2 > FARTHEST:
        return 1.0
    x1, x2 = math.exp(e1), math.exp(e2)
    total = d2 + x2 * d1 + x1 * x2 * d2 if around else max(d2 + x2 * d1, d1 + x1 * d2)
    return min(1.0, total * (1 + 1e-12))
