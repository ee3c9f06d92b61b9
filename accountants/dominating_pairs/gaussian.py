# SPDX-License-Identifier: Apache-2.0
"""Closed forms: the Gaussian mechanism (any number of times) and one Poisson-subsampled Gaussian.

With mu^2 = sum over the releases of 1 / noise_multiplier^2, the composition of Gaussians is one Gaussian of
noise multiplier 1/mu, and its exact curve is (Balle, Wang 2018, arXiv:1805.06530, theorem 8)

    delta(e) = Phi(mu/2 - e/mu) - exp(e) Phi(-mu/2 - e/mu).

One Poisson sample at rate q turns it into q delta(log(1 + (exp(e) - 1)/q)) for e >= 0, in both directions of
add-or-remove (Balle, Barthe, Gaboardi 2018, arXiv:1807.01647, theorem 8; equality for the Gaussian).
"""

import math
from collections.abc import Callable

from scipy.special import log_ndtr


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return delta of the Gaussian of sensitivity / noise = `mu` at `epsilon`, rounded up."""
    if mu == 0:
        return 0.0
    if not math.isfinite(mu):
        return 1.0
    upper = float(log_ndtr(mu / 2 - epsilon / mu))
    lower = float(log_ndtr(-mu / 2 - epsilon / mu)) + epsilon
    # The difference in units of its first term; the logarithms carry a rounding error of 1e-16 of their size.
    share = -math.expm1(min(lower - upper, 0.0)) + 1e-15 * (2 + abs(lower) + abs(upper) + 2 * epsilon)
    return min(1.0, math.exp(upper) * share * (1 + 1e-12))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon >= 0 with `gaussian_delta(mu, epsilon) <= delta`, from above; `inf` for delta 0."""
    if mu == 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    if delta <= 0 or not math.isfinite(mu):
        return math.inf
    return smallest(lambda e: gaussian_delta(mu, e) <= delta, start=mu * mu / 2 + mu, most=1e300)


def sampled_delta(mu: float, rate: float, epsilon: float) -> float:
    """Return delta of one Gaussian step on a Poisson sample at `rate`, rounded up."""
    inner = epsilon - math.log(rate) if epsilon > 700 else math.log1p(math.expm1(epsilon) / rate)
    # A smaller inner epsilon is the safe side.
    return min(1.0, rate * gaussian_delta(mu, inner * (1 - 4e-16)))


def sampled_epsilon(mu: float, rate: float, delta: float) -> float:
    """Return the smallest epsilon >= 0 of one Gaussian step on a Poisson sample at `rate`, from above."""
    if delta >= rate:
        return 0.0
    inner = gaussian_epsilon(mu, delta / rate * (1 - 1e-15))
    if inner > 700:
        return inner + math.log(rate) + 1e-9
    return math.log1p(rate * math.expm1(inner)) * (1 + 1e-12)


def smallest(holds: Callable[[float], bool], *, start: float, most: float = 1e15) -> float:
    """Return the smallest x >= 0 at which the monotone `holds` becomes true, approached from above to 1e-10.

    `inf` where that lies beyond `most`.
    """
    if holds(0.0):
        return 0.0
    low, high = 0.0, max(start, 1e-12)
    while not holds(high):
        low, high = high, 2 * high
        if high > most:
            return math.inf
    while high - low > 1e-10 * high and high > 1e-15:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
