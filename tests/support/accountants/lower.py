# SPDX-License-Identifier: Apache-2.0
"""An epsilon that is never above the truth (up to rounding errors), to hold upper bounds against.

Connecting the dots moves each loss by x, |x| <= mesh, with 0 <= E_P[x] <= mesh^2 / 8. By Hoeffding's inequality
the composed loss is moved up by at most T mesh^2 / 8 + mesh sqrt(T log(1/b) / 2), except with probability b.
"""

import math

import numpy as np
from scipy.special import ndtr

from accountants.dominating_pairs.sampled_step import position
from accountants.methods.pld import _steps
from accountants.privacy_loss.direction import Direction


def lower_epsilon(items, upper, delta, error=2e-3):
    """Bound the epsilon of merged leaves from below; `upper` is an upper bound, `error` the relative error."""
    return max(_one_direction(_steps(items), upper, delta, error, removed) for removed in (True, False))


def _one_direction(steps, upper, delta, error, removed):
    side = Direction.of(steps, removed, delta)
    beta = 1e-3 * delta
    spread = math.sqrt(side.outlook.steps * math.log(1 / beta) / 2)
    mesh = float(np.float32(error * upper / spread))
    _, order = side.outlook.at_delta(delta)
    found = side.tail(mesh, mesh, 0.6 * order, 0.0, delta)
    if found is None:
        return 0.0
    tail = found[1]
    moved = mesh * spread + side.outlook.steps * mesh * mesh / 8
    masses = np.maximum(tail.masses - 2 * tail.noise, 0.0) * (1 - 1e-9)
    # what came in from the left of the window, what lies below its lowest grid point, what moved far
    lost = (
        beta
        + 1e-4 * delta
        + sum(n * _below(step, ends[0], removed) for (step, n), ends in zip(steps, side.ends, strict=True))
    )

    def dear(epsilon):
        return float(np.sum(masses * np.maximum(-np.expm1(epsilon - tail.losses), 0.0))) > delta + lost

    low, high = 0.0, upper
    if not dear(low):
        return 0.0
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if dear(middle) else (low, middle)
    return max(0.0, low - moved)


def _below(step, low, removed):
    s, q = step.noise_multiplier, step.sampling_rate
    if q < 1 and low <= math.log1p(-q) * (1 - 1e-9) and removed:
        return 0.0
    x = float(position(step, np.array([low if removed else -low]))[0])
    return (1 - q) * ndtr(x / s) + q * ndtr((x - 1) / s) if removed else ndtr(-x / s)
