# SPDX-License-Identifier: Apache-2.0
"""The composition of laws on one grid, by Fourier transform under an exponential tilt, with its errors bounded.

Each law p is tilted, t(l) = p(l) exp(theta l - psi), psi = log sum p exp(theta l); the circular convolution r
of all t gives back p composed as r(l) exp(Psi - theta l), Psi the sum of all psi. Near the epsilon asked for, r
is then no rare event but the bulk of a law, so that rounding errors do not drown a small delta.

Four errors are added to the answer, none of them is ignored:

- mass at infinity composes apart, 1 - prod (1 - p_inf)^n;
- mass right of the window, by Chernoff's bound exp(Psi(b) - b * top) at one order b;
- rounding errors of the transforms: with u the rounding unit, at most c u log2(size) times the sum of the
  absolute inputs for each output, c = 8 (a radix-2 pass loses at most 4.3 u: 2.24 u for the complex product,
  Brent, Percival, Zimmermann 2007, u for its twiddle factor, u for the sum; passes of radix 3 and 5 less per
  bit), carried through the powers as |x^n - y^n| <= n |x - y| max(|x|, |y|)^(n-1);
- rounding errors of tilting, relative, by inflation of each mass.

Mass left of the window reappears inside it and only raises the answer.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, rfft

from accountants.dominating_pairs.grid_law import UNIT, Law
from accountants.privacy_loss.prv_convolution import power

Array = NDArray[np.float64]
Laws = tuple[tuple[Law, int], ...]

_PER_PASS = 8


@dataclass(frozen=True, slots=True)
class Window:
    """The grid of a composition: its mesh, first index and number of points; the tilt; the order of its end."""

    mesh: float
    first: int
    size: int
    tilt: float
    order: float


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """The losses >= 0 of a composed law: ascending `losses`, upper bounds `masses`, and all mass `beyond`.

    `noise` is the part of `masses` that pays for rounding errors.
    """

    losses: Array
    masses: Array
    noise: Array
    beyond: float

    def delta(self, epsilon: float) -> float:
        """Return an upper bound on delta at `epsilon`; no better than at the least loss kept."""
        return min(1.0, self.beyond + self._above(self.masses, epsilon) * (1 + 1e-12))

    def noise_share(self, epsilon: float) -> float:
        """Return the part of `delta(epsilon)` that pays for rounding errors."""
        whole = self.delta(epsilon)
        return self._above(self.noise, epsilon) / whole if whole > 0 else 0.0

    def slope(self, epsilon: float) -> float:
        """Return -d log delta / d epsilon."""
        i = int(np.searchsorted(self.losses, epsilon, "right"))
        whole = self.delta(epsilon)
        falling = float(np.sum(self.masses[i:] * np.exp(epsilon - self.losses[i:])))
        return falling / whole if whole > 0 else math.inf

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon >= 0 with `delta(epsilon) <= delta`, from above; `inf` if there is none."""
        if not self.beyond < delta or not len(self.losses):
            return math.inf
        value = self._solve(delta - self.beyond)
        nudge = 1e-13
        while self.delta(value) > delta and nudge < 1e-3:
            value, nudge = value * (1 + nudge) + 1e-300, 4 * nudge
        return value if self.delta(value) <= delta else math.inf

    def _solve(self, delta: float) -> float:
        above = np.cumsum(self.masses[::-1])[::-1]
        within = np.flatnonzero(above <= delta)
        last = int(within[0]) if len(within) else len(above) - 1
        start = int(np.searchsorted(self.losses, self.losses[last] - 60))  # delta is reached within
        losses, above = self.losses[start : last + 1], above[start : last + 1]
        # sums of the masses times exp(origin - loss), everything above included
        scaled = self.masses[start:] * np.exp(losses[-1] - self.losses[start:])
        falling = np.cumsum(scaled[::-1])[::-1][: len(losses)]
        deltas = above - np.exp(losses - losses[-1]) * falling
        dear = np.flatnonzero(deltas > delta)
        if not len(dear):
            return float(losses[0])
        i = int(dear[-1]) + 1
        if i >= len(losses):
            return float(losses[-1])
        inside = float(losses[-1]) + math.log(max(above[i] - delta, 1e-300) / falling[i])
        return min(max(inside, float(losses[i - 1])), float(losses[i]))

    def _above(self, masses: Array, epsilon: float) -> float:
        epsilon = max(epsilon, float(self.losses[0])) if len(self.losses) else epsilon
        i = int(np.searchsorted(self.losses, epsilon, "right"))
        return float(np.sum(masses[i:] * -np.expm1(epsilon - self.losses[i:])))


def compose(laws: Laws, window: Window, kind: type[np.floating] = np.float64) -> Tail:
    """Compose `laws` (law, count) in the window; `kind` is the precision of the transforms.

    Guarantees:
        - pessimistic: `delta` of the result is nowhere below that of the composition of `laws`.
    """
    mesh, size, theta = window.mesh, window.size, window.tilt
    moment, masses, error = transformed(laws, window, kind)
    indices = np.arange(max(window.first, 0), window.first + size)
    exponents = moment - theta * mesh * indices
    slack = 1 + 4 * UNIT * (4 + np.abs(exponents) + abs(moment))
    scale = np.exp(np.minimum(exponents, 600.0)) * slack
    kept = np.maximum(masses[indices % size], 0.0)
    missing = sum(count * math.log1p(-law.infinite) if law.infinite < 1 else -math.inf for law, count in laws)
    end = sum(count * log_moment(law, mesh, window.order) for law, count in laws)
    outside = end - window.order * mesh * (window.first + size)
    beyond = -math.expm1(missing) + math.exp(min(outside, 0.0) + 1e-6)
    return Tail(
        mesh * indices.astype(np.float64), (kept + error) * scale, error * scale, beyond * (1 + 1e-12)
    )


def transformed(laws: Laws, window: Window, kind: type[np.floating]) -> tuple[float, Array, float]:
    """Compose the tilted laws: the sum Psi, the circular masses, and the error of any one of them."""
    size = window.size
    unit = max(float(np.finfo(kind).eps) / 2, 1e-300)
    each = _PER_PASS * math.log2(size) * unit
    moments: list[float] = []
    product: NDArray[np.complexfloating] = np.ones(1, dtype=np.complex128)
    logs, parts = np.zeros(1), np.zeros(1)
    for law, count in laws:
        tilted, psi = _tilted(law, window)
        moments.append(count * psi)
        spectrum = np.asarray(rfft(tilted.astype(kind)))
        product = product * power(spectrum, count)
        sizes = np.abs(spectrum).astype(np.float64) + each
        logs, parts = logs + count * np.log(sizes), parts + count / sizes
    bound = np.exp(np.minimum(logs, 0.0))
    error = 2 / size * float(np.sum(bound * (1.01 * parts * (each + 4 * unit) + each)))
    composed = np.asarray(irfft(product, n=size)).astype(np.float64)
    return math.fsum(moments), composed, error * 1.01


def _tilted(law: Law, window: Window) -> tuple[Array, float]:
    """Tilt the law and lay it on the circle; its mass is then 1, up to inflation by its rounding errors."""
    exponents, psi = _exponents(law, window.mesh, window.tilt)
    tilted = np.exp(exponents - psi)
    losses = window.mesh * (law.first + np.arange(len(tilted)))
    logs = np.maximum(np.abs(exponents), abs(psi)) + np.abs(window.tilt * losses)
    tilted *= 1 + 4 * UNIT * (2 + np.where(np.isfinite(logs), 2 * logs, 0.0))
    circle = np.zeros(window.size)
    for start in range(0, len(tilted), window.size):
        piece = tilted[start : start + window.size]
        at = (law.first + start) % window.size
        head = min(len(piece), window.size - at)
        circle[at : at + head] += piece[:head]
        circle[: len(piece) - head] += piece[head:]
    return circle, psi


def log_moment(law: Law, mesh: float, order: float) -> float:
    """Compute log sum p exp(order * l)."""
    return _exponents(law, mesh, order)[1]


def _exponents(law: Law, mesh: float, order: float) -> tuple[Array, float]:
    with np.errstate(divide="ignore"):
        indices = (law.first + np.arange(len(law.masses))).astype(np.float64)
        exponents = np.log(law.masses) + order * mesh * indices
    peak = float(np.max(exponents))
    return exponents, peak + math.log(float(np.sum(np.exp(exponents - peak))))
