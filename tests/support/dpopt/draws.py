# SPDX-License-Identifier: Apache-2.0
"""Simulated trainings whose epsilon is known exactly, as evidence."""

import functools
import math

import numpy as np
from scipy.stats import binom

from dpopt.audit import GAUSSIAN, Evidence


@functools.cache
def mu_of(epsilon, delta=1e-5):
    """The Gaussian release that is (epsilon, delta)-private and no better."""
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if GAUSSIAN.epsilon(middle, delta) < epsilon else (low, middle)
    return low


def gaussian(rng, m, mu, noise=1.0):
    """A canary each in its own coordinate, in units of which the noise has the deviation `noise`."""
    included = rng.random(m) < 0.5
    scores = noise * (rng.standard_normal(m) + mu * included)
    return Evidence(scores, included, "dirac", independent=True, noise_std=noise)


def randomised_response(rng, m, epsilon, delta):
    """Every coin told truly with probability delta, else by randomised response: (epsilon, delta)-private exactly."""
    included = rng.random(m) < 0.5
    told = included ^ (rng.random(m) > 1 / (1 + math.exp(-epsilon)))
    sign = np.where(told, 1.0, -1.0)
    betrayed = rng.random(m) < delta
    scores = np.where(betrayed, np.where(included, 9.0, -9.0), sign) + 1e-6 * rng.standard_normal(m)
    return Evidence(scores, included, "response", independent=True)


def together(rng, m, chance, epsilon):
    """With a small chance all coins are told by randomised response at once, else none."""
    included = rng.random(m) < 0.5
    if rng.random() > chance:
        return Evidence(rng.standard_normal(m), included, "together")
    told = included ^ (rng.random(m) > 1 / (1 + math.exp(-epsilon)))
    return Evidence(np.where(told, 1.0, -1.0) + 1e-6 * rng.standard_normal(m), included, "together")


def allowed(draws, rate=0.05):
    """The number of false alarms that so many draws at this rate exceed once in a thousand times at most."""
    return int(binom.ppf(0.999, draws, rate))
