# SPDX-License-Identifier: Apache-2.0
"""Moments of likelihood ratios, at many orders and for many pairs at once: what Renyi divergences are made of.

With l = log dP/dQ and E_Q[exp(l)] = 1, the moment of order a is

    A(a) - 1 = E_Q[exp(a l)] - 1 = E_Q[h_a(l)],    h_a(l) = exp(a l) - 1 - a (exp(l) - 1) >= 0,

a sum of positive terms, so that tiny divergences keep all their digits; the other direction, E_P[exp(-(a-1) l)], is
h_(1-a) under Q. A pair whose halves come from two laws (`accountants.dominating_pairs.replaced_record`) sums h_a over l > 0 of the one
and h_(1-a) over l > 0 of the other.

The integrals run along a line of outputs. Whole lines by the trapezoidal rule: the integrand is analytic in a strip of
half-width d around them, so that the error falls like exp(d^2 / 2 - 2 pi d / pace), d and pace in units of the noise
(Trefethen, Weideman 2014, SIAM Review 56, theorem 5.1): 1e-16 at the pace used. Half lines by Gauss-Legendre panels of
16 nodes, to about the same.

Orders are taken in blocks, each on a line as long as it needs. An order whose divergence is above the least of
(divergence + 120 / (order - 1)) over smaller orders is best for no delta above 1e-52, in no composition, since
divergences grow with the order: from there on a bound that costs nothing takes its place.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Nodes = tuple[Array, Array]
"""Losses of each pair at its nodes, and logarithms of the masses under Q: a row for each pair."""
Density = Callable[[Array], Nodes]
"""Losses, and logarithms of the density of Q, at the outputs of each pair."""

WIDE = 9.5
"""How many noise standard deviations the lines reach beyond the centres: 1e-20 of the mass lies further out."""

_MOST_NODES = 60_000
_EDGES = 10 * 2.0 ** np.arange(12)
_DEEPEST = 120.0  # -log of the least delta for which the orders left out could matter
_LEAST = -640.0  # no moment is taken to be below exp() of it
_NEAR = 0.03
_TINY, _POWERS = 0.1, 12  # the first power left out is 1e-17 of the rest
_RANGE = 1.1
_PANEL, _WEIGHTS = np.polynomial.legendre.leggauss(16)


class Part(NamedTuple):
    """One law of Q: its nodes for orders up to a given one, and whether h_a or h_(1-a) is summed over them."""

    nodes: Callable[[float], Nodes | None]
    forward: bool


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """Where a pair's centres lie, for a few pairs of one `least_like` noise.

    `density` gives losses and log densities at outputs; `noise` is a column, a row for each pair. Q is centred
    between `left` and 0, and no power a of the likelihood ratio moves its bulk by more than a * `reach`: noise^2 times the slope of the loss.
    """

    density: Density
    noise: Array
    reach: float
    left: float = 0.0

    def whole(self, low: float, high: float, strip: float) -> Nodes | None:
        """Lay nodes over the line, for powers of the likelihood ratio from `low` to `high`; None for too many of them.

        The zeros of the ratio lie pi noise^2 beside the line; `strip` is the part of that which is used. Positive powers
        are nowhere larger there than on the line; of negative ones that is true up to half of it.
        """
        least = _least_of(self.noise)
        depth = min(strip * math.pi * least, 6.0)
        pace = 2 * math.pi * depth / (40 + depth * depth / 2)
        start, stop = (self.left + self.reach * low) / least - WIDE, self.reach * high / least + WIDE
        if not (stop - start) < _MOST_NODES * pace:
            return None
        losses, logs = self.density(self.noise * np.arange(start, stop + pace, pace))
        return losses, logs + np.log(pace * self.noise)

    def half(self, order: float) -> Nodes | None:
        """Lay Gauss-Legendre panels from `left` on; the integrand is analytic 1.5 noise^2 beside the line at least."""
        least = _least_of(self.noise)
        length = self.reach * order / least + WIDE + 1
        if not length * len(_PANEL) < _MOST_NODES * min(3.0, 3 * least):
            return None
        number = math.ceil(length / min(3.0, 3 * least))
        places = (np.arange(number)[:, None] + (1 + _PANEL) / 2).ravel() * (length / number)
        losses, logs = self.density(self.left + self.noise * places)
        return losses, logs + np.log(np.tile(_WEIGHTS, number) * (length / number / 2) * self.noise)


def least_like(noise: float) -> float:
    """Round a noise multiplier down to one of few: pairs for which it is the same share the places of their nodes."""
    return _RANGE ** max(-7000, math.floor(math.log(noise) / math.log(_RANGE)))


def _least_of(noise: Array) -> float:
    return least_like(float(noise[0, 0]))


def log_moments(directions: Sequence[Sequence[Part]], orders: Array, known: Array, unit: float) -> Array:
    """Compute log A, the largest over `directions` of the sums of their parts, at ascending `orders` > 1.

    Args:
        directions: each one's parts are added.
        orders: ascending.
        known: an upper bound of log A of each pair (rows) at each order, taken where the integrals are no use.
        unit: the noise over the distance of the centres: the orders that make a line longer by one noise.

    A row of the result depends on its own pair only, but for its last digits.
    """
    found = known.copy()
    best, open_ = np.full(len(known), np.inf), np.full(len(known), True)
    for chosen in np.split(np.arange(len(orders)), np.searchsorted(orders, 1 + unit * _EDGES, "right")):
        if not len(chosen):
            continue
        block = orders[chosen]
        logs = _block(directions, block)
        if logs is None:
            break
        better = np.minimum(known[:, chosen], np.logaddexp(0.0, logs))
        found[:, chosen] = np.where(open_[:, None], better, known[:, chosen])
        divergences = found[:, chosen] / (block - 1)
        best = np.minimum(best, np.min(divergences + _DEEPEST / (block - 1), axis=1))
        open_ &= divergences[:, -1] <= best
        if not open_.any():
            break
    return found


def _block(directions: Sequence[Sequence[Part]], orders: Array) -> Array | None:
    """The logarithms of A - 1 at a few neighbouring orders."""
    every = []
    for parts in directions:
        total = np.full(1, _LEAST)
        for part in parts:
            nodes = part.nodes(float(orders[-1]))
            if nodes is None:
                return None
            total = np.logaddexp(total, log_excess(orders if part.forward else 1 - orders, *nodes))
        every.append(total)
    return np.max(every, axis=0)


def log_excess(orders: Array, losses: Array, logs: Array) -> Array:
    """Compute log of the sum of exp(logs) h_a(losses) along each row, at orders a all above 1 or all below 0."""
    far = np.max(np.abs(losses), axis=0) * max(1.0, float(np.max(np.abs(orders)))) > 200
    total = np.full((len(losses), len(orders)), _LEAST)
    for chosen, terms in ((~far, _near), (far, _far)):
        if chosen.any():
            total = np.logaddexp(total, terms(orders[:, None], losses[:, None, chosen], logs[:, chosen]))
    return total


def _near(a: Array, losses: Array, logs: Array) -> Array:
    """Exponents of at most 200: in plain numbers. h_a(l) is (exp(a l) - 1 - a l) - a (exp(l) - 1 - l)."""
    peaks = np.max(logs, axis=1)[:, None]
    weights = np.exp(np.maximum(logs - peaks, -700.0))
    # both exp(a l) and exp(l) are expanded
    tiny = np.max(np.abs(losses), axis=(0, 1)) * max(1.0, float(np.max(np.abs(a)))) < _TINY
    sums = _by_powers(a[:, 0], losses[:, 0, tiny], weights[:, tiny])
    values = _beyond_tangent(a * losses[:, :, ~tiny])
    values -= a * _beyond_tangent(losses[:, :, ~tiny])
    sums += (np.maximum(values, 0.0) @ weights[:, ~tiny, None])[:, :, 0]
    return np.log(np.maximum(sums, 1e-300)) + peaks


def _by_powers(a: Array, losses: Array, weights: Array) -> Array:
    """Sum weights h_a(losses) along rows for tiny losses, h_a(l) = sum over k >= 2 of (a^k - a) l^k / k!."""
    sums, powers = np.zeros((len(losses), len(a))), weights * losses
    for k in range(2, _POWERS):
        powers = powers * losses
        factor = a * np.expm1((k - 1) * np.log(a)) if a[0] > 0 else a**k - a
        sums += np.sum(powers, axis=1)[:, None] * factor / math.factorial(k)
    return np.maximum(sums, 0.0)


def _beyond_tangent(x: Array) -> Array:
    """exp(x) - 1 - x."""
    values = np.expm1(x) - x
    small = np.abs(x) < _NEAR
    y = x[small]
    values[small] = y * y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7)))))
    return values


def _far(a: Array, losses: Array, logs: Array) -> Array:
    """Larger exponents: in logarithms, the largest term of h_a taken out."""
    right, left = np.maximum(losses, 1e-9), np.minimum(losses, -1e-9)
    if float(a[0, 0]) < 0:
        grown = np.log(-a) + right, -np.expm1(-right) - np.exp(-right) * np.expm1(a * right) / a
        fallen = a * left, -np.expm1(-a * left) - a * np.exp(-a * left) * np.expm1(left)
    else:
        fall = -(a - 1) * right
        grown = a * right, (a - 1) * np.exp(fall) * np.expm1(-right) - np.expm1(fall)
        fallen = np.log(a), np.expm1(a * left) / a - np.expm1(left)
    main = np.where(losses > 0, grown[0], fallen[0]) + logs[:, None, :]
    terms = main + np.log(np.maximum(np.where(losses > 0, grown[1], fallen[1]), 1e-300))
    peaks = np.max(terms, axis=2)
    return peaks + np.log(np.sum(np.exp(np.maximum(terms - peaks[:, :, None], -700.0)), axis=2))
