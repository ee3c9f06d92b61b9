# SPDX-License-Identifier: Apache-2.0
"""Mechanisms on a handful of records, written out: mixtures of Gaussians over all samples, and their exact curves."""

from itertools import combinations

import numpy as np


def subsets(indices):
    indices = tuple(indices)
    return [s for size in range(len(indices) + 1) for s in combinations(indices, size)]


def poisson(contributions, rate):
    """Centres and weights of a Poisson sample's sum."""
    everyone = range(len(contributions))
    return [
        (sum(contributions[i] for i in s), rate ** len(s) * (1 - rate) ** (len(contributions) - len(s)))
        for s in subsets(everyone)
    ]


def truncated(contributions, rate, most):
    """The same, cut to `most` records chosen evenly."""
    found = []
    for s in subsets(range(len(contributions))):
        weight = rate ** len(s) * (1 - rate) ** (len(contributions) - len(s))
        kept = list(combinations(s, min(most, len(s))))
        found += [(sum(contributions[i] for i in k), weight / len(kept)) for k in kept]
    return found


def fixed_size(contributions, size):
    kept = list(combinations(range(len(contributions)), size))
    return [(sum(contributions[i] for i in k), 1 / len(kept)) for k in kept]


def density(mixture, x, sigma):
    return sum(w * np.exp(-((x - c) ** 2) / 2 / sigma**2) for c, w in mixture) / sigma / np.sqrt(2 * np.pi)


def hockey(p, q, sigma, epsilon):
    """The hockey-stick divergence of two mixtures on a line, by the trapezoidal rule (to about 1e-8)."""
    centres = [c for c, _ in (*p, *q)]
    x = np.linspace(min(centres) - 10 * sigma, max(centres) + 10 * sigma, 20_001)
    gap = density(p, x, sigma) - np.exp(epsilon) * density(q, x, sigma)
    return float(np.sum(np.maximum(gap, 0)) * (x[1] - x[0]))
