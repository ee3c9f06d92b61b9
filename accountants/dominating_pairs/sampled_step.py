# SPDX-License-Identifier: Apache-2.0
"""One step of the Poisson-subsampled Gaussian, and its privacy loss.

With x ~ P = (1-q) N(0, s^2) + q N(1, s^2) (a record removed), the loss is l(x) = log(1 - q + q exp((2x-1) /
(2 s^2))), increasing in x.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from accountants.dominating_pairs.renyi_moments import Line, Part

Array = NDArray[np.float64]

ONE, POISSON, FIXED, EMPTIED, SHIFTED, GROUP = "one", "poisson", "fixed", "emptied", "shifted", "group"


@dataclass(frozen=True, slots=True)
class Step:
    """One step with noise multiplier s and sampling rate q (q = 1: the plain Gaussian).

    `pair` says what neighbours differ in: `ONE`, a record is there or not; `POISSON` or `FIXED`, it is replaced, in
    a Poisson sample or in one of fixed size; `EMPTIED`, it is emptied in one of fixed size (`accountants.dominating_pairs.replaced_record`);
    `SHIFTED`, it is there or not and moves the output by `shift` besides, sampled or not; `GROUP`, `size` records
    are there or not, each sampled by itself (`accountants.dominating_pairs.feedback_step`).
    """

    noise_multiplier: float
    sampling_rate: float
    pair: str = ONE
    shift: float = 0.0
    size: int = 1


def loss(step: Step, x: Array) -> Array:
    """Return the loss at the outputs x."""
    s, q = step.noise_multiplier, step.sampling_rate
    return (x - 0.5) / s / s if q == 1 else sampled_loss(s, q, x)


def sampled_loss(s: float | Array, q: float | Array, x: Array) -> Array:
    """Return the loss at the outputs x of steps with noise multiplier s and sampling rate q < 1."""
    y = (x - 0.5) / s / s
    small = np.log1p(q * np.expm1(np.minimum(y, 1.0)))
    return np.where(y < 1, small, np.logaddexp(np.log1p(-q), np.log(q) + y))


def sampled_density(s: float | Array, q: float | Array, x: Array) -> tuple[Array, Array]:
    """Return losses, and logarithms of the density of N(0, s^2), at the outputs x."""
    return sampled_loss(s, q, x), -x * x / (2 * s * s) - np.log(s * math.sqrt(2 * math.pi))


def sampled_directions(steps: Sequence[Step]) -> list[list[Part]]:
    """What the moments of a few sampled steps are summed over: removing a record, which adding one never exceeds.

    Mironov, Talwar, Zhang 2019, arXiv:1908.10530, theorems 4 and 5.
    """
    noise = np.array([step.noise_multiplier for step in steps])[:, None]
    rate = np.array([step.sampling_rate for step in steps])[:, None]
    line = Line(lambda x: sampled_density(noise, rate, x), noise, reach=1.0)
    return [[Part(lambda a: line.whole(0, a, 0.9), True)]]


def sampled_nodes(step: Step, ends: tuple[float, float], removed: bool, count: int) -> tuple[Array, Array]:
    """Lay `count` nodes over the losses between `ends`, with the logarithms of their P-masses: roughly."""
    s = step.noise_multiplier
    with np.errstate(divide="ignore"):
        borders = position(step, np.array(ends if removed else (-ends[1], -ends[0])))
    low = max(float(borders[0]), -14 * s)
    high = max(min(float(borders[1]), 1 + 40 * s), low + s, math.nextafter(low, math.inf))
    x = np.linspace(low, high, count)
    losses = loss(step, x)
    density = -x * x / (2 * s * s) - math.log(s * math.sqrt(2 * math.pi) * (count - 1) / (high - low))
    return (losses, density + losses) if removed else (-losses, density)


def position(step: Step, losses: Array) -> Array:
    """Invert the loss: the x at which it is reached, -inf below its infimum log(1 - q)."""
    s, q = step.noise_multiplier, step.sampling_rate
    near = np.log(np.maximum(np.expm1(np.minimum(losses, 1.0)) + q, 0.0))
    far = np.maximum(losses, 1.0)
    y = np.where(losses < 1, near, far + np.log1p(-(1 - q) * np.exp(-far))) - math.log(q)
    return s * s * y + 0.5
