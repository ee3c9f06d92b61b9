# SPDX-License-Identifier: Apache-2.0
"""The composition of many Poisson-subsampled Gaussian steps on one grid, by Fourier transform.

What is discretised is a distribution in the sense of the library `prv_accountant`: it has `probability`, `mean`
and `pm_inf`, which is all that its discretiser asks for.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from accountants.dominating_pairs.sampled_step import Array, Step, loss, position

if TYPE_CHECKING:
    from prv_accountant.discrete_privacy_random_variable import DiscretePrivacyRandomVariable
    from prv_accountant.domain import Domain


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


@dataclass(frozen=True, slots=True)
class _Truncated:
    """The loss of a step given that it falls into [low, high]."""

    step: Step
    low: float
    high: float

    pm_inf = 0.0

    def probability(self, left: Array, right: Array) -> Array:
        """Return the mass of the contiguous cells [left, right]."""
        edges = np.clip(np.append(left, right[-1]).astype(np.float64), self.low, self.high)
        return _masses(self.step, position(self.step, edges)) / self._mass()

    def mean(self) -> float:
        """Return the mean to about 1e-16, by Gauss-Legendre panels of half the width of a feature."""
        s = self.step.noise_multiplier
        ends = position(self.step, np.array([self.low, self.high]))
        start, stop = max(ends[0], -14 * s), min(ends[1], 1 + 14 * s)
        panels = int(min(200_000, math.ceil((stop - start) / (min(s, s * s) / 2)) + 1))
        borders = np.linspace(start, stop, panels + 1)
        half = np.diff(borders) / 2
        x = ((borders[1:] + borders[:-1]) / 2)[:, None] + half[:, None] * _NODES
        weights = half[:, None] * _WEIGHTS * _density(self.step, x)
        return float(np.sum(weights * loss(self.step, x))) / self._mass()

    def _mass(self) -> float:
        return float(np.sum(_masses(self.step, position(self.step, np.array([self.low, self.high])))))


def _density(step: Step, x: Array) -> Array:
    s, q = step.noise_multiplier, step.sampling_rate
    z, w = x / s, (x - 1) / s
    return ((1 - q) * np.exp(-z * z / 2) + q * np.exp(-w * w / 2)) / (s * math.sqrt(2 * math.pi))


def _masses(step: Step, x: Array) -> Array:
    """Return P(x[i] < X <= x[i+1]), from the nearer tail so that small masses keep their digits."""
    s, q = step.noise_multiplier, step.sampling_rate
    below = (1 - q) * ndtr(x / s) + q * ndtr((x - 1) / s)
    above = (1 - q) * ndtr(-x / s) + q * ndtr((1 - x) / s)
    return np.maximum(np.where(below[1:] < 0.5, np.diff(below), -np.diff(above)), 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Composition:
    """The composed loss on its grid, and the rounding error `noise` of a sum over it."""

    law: "DiscretePrivacyRandomVariable"
    noise: float

    def epsilon(self, delta: float, delta_error: float, eps_error: float) -> float | None:
        """Return the certified upper end of epsilon at `delta`; None where it is numerically unsound."""
        try:
            with np.errstate(all="ignore"):
                _, estimate, upper = self.law.compute_epsilon(delta - self.noise, delta_error, eps_error)
        except (ArithmeticError, IndexError, MemoryError, RuntimeError, ValueError):
            return None
        # An upper end below 0 certifies 0.
        sound = math.isfinite(upper) and upper >= -0.5 and upper - eps_error >= estimate - 1e-12
        return max(0.0, upper) if sound else None

    def delta(self, epsilon: float, delta_error: float, eps_error: float) -> float | None:
        """Return the certified upper end of delta at `epsilon`; None where it is numerically unsound."""
        with np.errstate(all="ignore"):
            estimate = float(self.law.compute_delta_estimate(epsilon - eps_error))
        upper = estimate + delta_error + self.noise
        return min(1.0, upper) if math.isfinite(estimate) and estimate > -self.noise else None


def compose(
    steps: tuple[tuple[Step, int], ...], half_width: float, mesh: float, delta_error: float
) -> Composition | None:
    """Compose `steps` (step, count) circularly on [-half_width, half_width]; None where that fails.

    The sum runs in float64, and again in extended precision where the rounding errors would show.
    """
    from prv_accountant.domain import Domain
    from scipy.fft import next_fast_len

    half_size = int(next_fast_len(math.ceil(half_width / mesh) + 1, real=True) or 0)
    size = 2 * half_size
    domain = Domain(-half_size * mesh, (half_size - 1) * mesh, size)
    try:
        with np.errstate(all="ignore"):
            laws = [(_discretise(step, domain), count) for step, count in steps]
            for kind in (np.float64, np.longdouble):
                if size * np.finfo(kind).eps * 1e-4 > delta_error:
                    continue
                composed = _convolve(laws, domain, kind)
                if composed.noise < delta_error:
                    return composed
    except (ArithmeticError, IndexError, MemoryError, RuntimeError, ValueError):
        pass
    return None


def _discretise(step: Step, domain: "Domain") -> "DiscretePrivacyRandomVariable":
    from prv_accountant.discretisers import CellCentred

    # The discretiser is duck-typed: it wants probability(), mean() and pm_inf only.
    return CellCentred().discretise(_Truncated(step, domain.t_min(), domain.t_max()), domain)  # pyright: ignore[reportArgumentType]


def _convolve(
    laws: "list[tuple[DiscretePrivacyRandomVariable, int]]", domain: "Domain", kind: type[np.floating]
) -> Composition:
    from prv_accountant.discrete_privacy_random_variable import DiscretePrivacyRandomVariable
    from scipy.fft import irfft, rfft

    size, middle = len(domain), len(domain) // 2
    product: NDArray[np.complexfloating] = np.ones(1, dtype=np.complex128)
    for law, count in laws:
        product = product * power(np.asarray(rfft(np.roll(law.pmf.astype(kind), -middle))), count)
    masses = np.roll(np.asarray(irfft(product, n=size)), middle)
    # True masses are >= 0, so the negative ones show the rounding errors: their sum counts the coherent
    # part, 8 sqrt(size) times the largest the random part (8 standard deviations).
    negative = np.maximum(-masses, 0.0)
    noise = 2 * float(negative.sum()) + 8 * math.sqrt(size) * float(negative.max())
    # Only losses above 0 matter for epsilon >= 0; one more unit keeps the search inside the grid.
    shift = sum(count * float(law.domain.shifts()) for law, count in laws)
    first = max(0, middle - 2 * math.ceil((1 + abs(shift)) / domain.dt() / 2))
    first -= first % 2
    kept = domain.shift_right(shift)
    kept = type(domain)(kept.t(first), kept.t_max(), size - first)
    return Composition(DiscretePrivacyRandomVariable(masses[first:], kept), noise)


def power(values: NDArray[np.complexfloating], count: int) -> NDArray[np.complexfloating]:
    """Raise to an integer power by squaring: faster than the complex power, and as accurate."""
    result = None
    while count:
        if count & 1:
            result = values.copy() if result is None else result * values
        count >>= 1
        if count:
            values = values * values
    assert result is not None
    return result
