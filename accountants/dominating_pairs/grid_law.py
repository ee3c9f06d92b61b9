# SPDX-License-Identifier: Apache-2.0
"""A privacy-loss law on a grid, and the chords that make one out of a curve: never below the truth.

Reference: Doroshenko, Ghazi, Kamath, Kumar, Manurangsi (2022), arXiv:2207.04380.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

UNIT = 2.0**-53
"""The relative rounding error of one float64 operation."""

FARTHEST = 650.0
"""The largest loss represented; exp() of it still leaves room for sums."""


@dataclass(frozen=True, slots=True, eq=False)
class Law:
    """Masses under P at the losses (first + i) * mesh, and the mass at infinity."""

    first: int
    masses: Array
    infinite: float


def connect(curve: Array, excess: Array, mesh: float) -> Law:
    """Connect the dots: `curve` at the losses 0, mesh, ... and `excess`, H - (1 - exp(e)), at ..., -mesh, 0."""
    below, above = len(excess) - 1, len(curve) - 1
    up, down = mesh * np.arange(above + 1.0), mesh * np.arange(-below, 1.0)
    # Both are H(0); the upper half may err upwards against the lower one, not the other way round.
    excess[-1] = max(curve[0], excess[-1])
    curve[0] = excess[-1] * (1 + 16 * UNIT)
    # The slope of a chord in exp(e) is the mass of Q above it; below 0 the `rest` is kept, 1 - slope.
    # Rounding may bend the chords the wrong way: straighten them from the top, which only raises the curve.
    slopes = np.append((curve[:-1] - curve[1:]) * np.exp(-up[:-1]) / math.expm1(mesh), 0.0)
    slopes = np.minimum(np.maximum.accumulate(slopes[::-1])[::-1], 1.0)
    rest = np.append((excess[1:] - excess[:-1]) * np.exp(-down[:-1]) / math.expm1(mesh), 1.0 - slopes[0])
    rest = np.maximum(np.minimum.accumulate(rest[::-1])[::-1], 0.0)
    middle = [rest[-1] - rest[-2] + 4 * UNIT]
    jumps = np.concatenate([np.diff(rest[:-1]), middle, slopes[:-1] - slopes[1:]])
    masses = np.append(0.0, jumps * np.exp(mesh * np.arange(1 - below, above + 1)))
    infinite = float(curve[-1])
    masses[0] = max(0.0, 1 - infinite - float(np.sum(masses))) + 64 * UNIT
    return Law(-below, masses * (1 + 8 * UNIT), infinite)


def crossing(curve: Callable[[Array], Array], mass: float, size: int) -> Array:
    """Find to 1 % from above the x > 0 where each falling `curve` reaches `mass`."""
    low, high = np.full(size, 1e-12), np.full(size, 2 * FARTHEST)
    while np.any(high > 1.01 * low):
        middle = np.sqrt(low * high)
        dear = curve(middle) > mass
        low, high = np.where(dear, middle, low), np.where(dear, high, middle)
    return high
