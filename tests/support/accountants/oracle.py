# SPDX-License-Identifier: Apache-2.0
"""Exact curves of one to three Poisson-subsampled Gaussians, by other means than the package's.

One step in 40 digits (mpmath). Compositions as delta_n(e) = E_P[delta_(n-1)(e - L(x))], the expectation by the
trapezoidal rule: the integrand is analytic, so that halving the step tells the error, which `composed` returns.
"""

import itertools
import math

import mpmath
import numpy as np
from scipy.special import ndtr

EXACT = mpmath.MPContext()
EXACT.dps = 40


def exact_delta(sigma, q, removed, epsilon):
    """delta of one step at any real epsilon, in 40 digits."""
    s, q, e = (EXACT.mpf(float(x)) for x in (sigma, q, epsilon))
    if not removed:
        return max(EXACT.zero, 1 - EXACT.exp(e) + EXACT.exp(e) * exact_delta(sigma, float(q), True, -e))
    inside = (EXACT.exp(e) - 1 + q) / q
    if inside <= 0:
        return 1 - EXACT.exp(e)
    x = s * s * EXACT.log(inside) + EXACT.mpf(1) / 2
    above = (1 - q) * EXACT.ncdf(-x / s) + q * EXACT.ncdf((1 - x) / s)
    return above - EXACT.exp(e) * EXACT.ncdf(-x / s)


def _delta(sigma, q, removed, e):
    """The same in float64, for arrays: 1e-15 absolute."""
    if not removed:
        return -np.expm1(e) + np.exp(e) * _delta(sigma, q, True, -e)
    inside = (np.expm1(e) + q) / q
    x = sigma**2 * np.log(np.maximum(inside, 1e-300)) + 0.5
    above = (1 - q) * ndtr(-x / sigma) + q * ndtr((1 - x) / sigma)
    return np.where(inside > 0, above - np.exp(e) * ndtr(-x / sigma), -np.expm1(e))


def composed(steps, removed, epsilon):
    """delta of the composition of two or three (sigma, q) at `epsilon`, and a bound on its error."""
    pieces = 200 if len(steps) == 2 else 25
    coarse, fine = (_composed(steps, removed, epsilon, p) for p in (pieces, 2 * pieces))
    return fine, abs(fine - coarse) + 1e-14


def _composed(steps, removed, epsilon, pieces):
    *outer, last = steps
    losses, weights = np.zeros(1), np.ones(1)
    for sigma, q in outer:
        x = np.arange(-10 * sigma, 1 + 10 * sigma, min(sigma, sigma**2) / pieces)
        loss = np.log1p(q * np.expm1((x - 0.5) / sigma**2))
        base = np.exp(-((x / sigma) ** 2) / 2) / sigma / math.sqrt(2 * math.pi) * (x[1] - x[0])
        loss, mass = (loss, base * np.exp(loss)) if removed else (-loss, base)
        losses = (losses[:, None] + loss).ravel()
        weights = (weights[:, None] * mass).ravel()
    parts = (_delta(*last, removed, epsilon - chunk) @ mass for chunk, mass in _chunks(losses, weights))
    return float(math.fsum(float(part) for part in parts))


def _chunks(losses, weights, size=1 << 18):
    for start in itertools.count(0, size):
        if start >= len(losses):
            return
        yield losses[start : start + size], weights[start : start + size]
