# SPDX-License-Identifier: Apache-2.0
"""The Gaussian mechanism in whole numbers: sums rounded to a public grid, noise of whole cells drawn exactly.

What is drawn. A sum becomes a vector q of whole cells, and what is released is a function of q + floor(N), with N
normal, real, ideal, of standard deviation SCALE cells. Since q is whole, q + floor(N) = floor(q + N): the floor of
the Gaussian mechanism's own output. Post-processing costs nothing, so the event is `Gaussian`, and *every* accountant,
subsampled or not, prices it without a new theorem. The discrete Gaussian on the same grid (Canonne, Kamath, Steinke
2020, arXiv:2004.00010) would have the Renyi curve of the event (their theorem 4, coordinate by coordinate), but no proven one under Poisson
sampling in the PLD or PRV accountants; at SCALE = 2^28 cells the two laws differ by about 1e-17 in ratio.

No float of the noise is ever seen: outputs lie on the grid for every input (Mironov 2012, CCS, is thereby moot).

What rounding costs. With C the sensitivity of the ideal sum, r the relative error by which sums in floats exceed it,
G cells to the unit and d coordinates, neighbouring vectors q differ by at most

    G C (1 + r) + 1.25 sqrt(d) cells:

each coordinate of S G is rounded to float64 (by 1/8 at most, below 2^51, where it is clamped; clamping moves no two
numbers apart) and to a whole number (by 1/2). G is the largest for which SCALE cells of noise stand in the charged ratio
to that: rounding enlarges the noise by r + 1.25 sqrt(d) noise_multiplier / SCALE, or 5e-5 for 10^8 coordinates.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from accountants import Event
from clipping import ClippedSum
from dpopt.mechanisms.gaussian import GaussianMechanism
from dpopt.mechanisms.group_gaussian import GroupGaussianMechanism
from dpopt.randomness.cipher import CipherKey
from dpopt.randomness.ziggurat import SCALE, whole_normals

CipherSource = Callable[[str, torch.device], object]
"""(parameter name, device) -> a CipherKey that no other query uses; anything else is refused."""

ROUNDING = 2.0**-10
"""The default of what floats may add to the sensitivity, relatively: 0.1 % more noise."""

_PER_COORDINATE = 1.25
_LARGEST = 2.0**51
_DOWN = 1 - 2.0**-40  # covers every rounding in the arithmetic of public numbers
PART = 1 << 19
"""Coordinates to one stream of the cipher: part of the definition of the noise."""
_CHUNK = 1 << 14


def summation_rounding(num_examples: int, additions: int, dtype: torch.dtype = torch.float32) -> float:
    """The relative excess of sensitivity of a sum of `num_examples` clipped gradients in floats, in the worst case.

    `additions` is the largest number of additions that a term goes through: the number of terms for one running
    sum, its logarithm for sums by halves. In any order, the sum is off by at most
    ((1 + u)^additions - 1) * sum |terms| (Higham 2002, "Accuracy and Stability of Numerical Algorithms", section
    4.2); vectors of norm <= C make that num_examples * C, and both neighbours may be off. It holds where each example
    enters as one term. Layers with positions have more terms than examples, and theirs may cancel: the bound then
    takes the norm of the sum of their absolute values, over C, as so many more examples.
    """
    unit = torch.finfo(dtype).eps / 2
    return (2 * num_examples + 1) * math.expm1(additions * math.log1p(unit))


def fineness(sensitivity: float, ratio: float, coordinates: int, rounding: float) -> float:
    """Cells to the unit, the most for which SCALE >= ratio * (sensitivity in cells, all rounding included)."""
    cells = SCALE / ratio - _PER_COORDINATE * math.sqrt(coordinates)
    if cells < SCALE / ratio / 2:
        raise ValueError(
            f"expected noise below {SCALE:.2g} cells on half of the sensitivity; got noise of {ratio:g} sensitivities "
            f"on {coordinates} coordinates, whose rounding would take the other half; lower the noise multiplier, or "
            "train fewer parameters"
        )
    return cells * _DOWN / (sensitivity * (1 + rounding))


@dataclass(frozen=True, slots=True)
class Cells:
    """Parameters on one grid: `ratio` is the noise's standard deviation over the sensitivity, which share it."""

    names: tuple[str, ...]
    sensitivity: float
    ratio: float


@dataclass(frozen=True, slots=True)
class GridGaussianMechanism:
    """`mechanism` on a grid, with exact noise from a cipher.

    `rounding` bounds, relatively, by how much adding or removing an example moves the sum *as computed in floats*
    beyond its sensitivity; see `summation_rounding`. A `WholeSum` needs no such number.

    Guarantees
    ----------
    Given uniform words, one release is a function of the Gaussian mechanism of the event, on vectors of whole cells
    whose sensitivity in ratio to SCALE is at most 1 / noise_multiplier, over all groups together
    (test_guarantee_the_exact_curve_never_exceeds_the_charge,
    test_guarantee_neighbouring_sums_stay_within_the_charged_cells). The drawn noise is within 7e-350 of the ideal one
    in each coordinate. Assumed: AES-256, and that `rounding` is true of the sums.
    """

    mechanism: GaussianMechanism | GroupGaussianMechanism
    rounding: float = ROUNDING

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rounding) and self.rounding >= 0):
            raise ValueError(
                f"expected a finite rounding >= 0; got {self.rounding}; use summation_rounding(...), or leave it out"
            )

    @property
    def noise_multiplier(self) -> float:
        """That of the whole release."""
        return self.mechanism.noise_multiplier

    def event(self) -> Event:
        """The event of `mechanism`."""
        return self.mechanism.event()

    def check(self, sensitivities: Sequence[float], sizes: Sequence[int]) -> None:
        """Raise ValueError where `mechanism` cannot release such groups, or its noise is too large for the grid."""
        self.mechanism.check(sensitivities, sizes)
        if self.noise_multiplier == 0:
            return
        if isinstance(self.mechanism, GaussianMechanism):
            fineness(math.hypot(*sensitivities), self.noise_multiplier, sum(sizes), self.rounding)
            return
        stds = self.mechanism.stds(sensitivities, sizes)
        for bound, std, size in zip(sensitivities, stds, sizes, strict=True):
            fineness(bound, std / bound, size, self.rounding)

    def stds(self, sensitivities: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
        """The standard deviation of the noise in each group, before the rounding that enlarges it a little."""
        return self.mechanism.stds(sensitivities, sizes)

    def cells(self, clipped: ClippedSum) -> tuple[Cells, ...]:
        """The groups of parameters that share a grid."""
        if isinstance(self.mechanism, GaussianMechanism):
            return (Cells(tuple(sorted(clipped.total)), clipped.sensitivity, self.noise_multiplier),)
        if not clipped.groups:
            raise ValueError(
                "expected a clipped sum that knows its groups; got one without; give it groups=sum_groups(clipper, "
                "names), or use GaussianMechanism"
            )
        sizes = [sum(clipped.total[name].numel() for name in group.names) for group in clipped.groups]
        stds = self.mechanism.stds([group.sensitivity for group in clipped.groups], sizes)
        return tuple(
            Cells(group.names, group.sensitivity, std / group.sensitivity)
            for group, std in zip(clipped.groups, stds, strict=True)
        )

    def release(self, clipped: ClippedSum, noise: CipherSource, divisor: float = 1.0) -> dict[str, Tensor]:
        """The noisy sum over `divisor`, in the tensors of `clipped`."""
        released = {name: total.contiguous() for name, total in clipped.total.items()}
        if self.noise_multiplier == 0:
            return {name: total.div_(divisor) for name, total in released.items()}
        for group in self.cells(clipped):
            coordinates = sum(released[name].numel() for name in group.names)
            grid = fineness(group.sensitivity, group.ratio, coordinates, self.rounding)
            for name in group.names:
                add_whole_normal(released[name], grid, cipher_of(noise, name, released[name].device), divisor)
        return released


def cipher_of(noise: CipherSource, name: str, device: torch.device) -> CipherKey:
    """The key of the noise of one parameter."""
    key = noise(name, device)
    if not isinstance(key, CipherKey):
        raise ValueError(
            f"expected a cipher's key for the noise of {name}; got {type(key).__name__}, whose numbers are not "
            'cryptographic; run the mechanism with randomness="secure"'
        )
    return key


def whole(values: NDArray[np.floating], grid: float) -> NDArray[np.float64]:
    """The nearest whole cells, within 5/8 of values * grid clamped to +- 2^51."""
    cells = np.multiply(values, grid, dtype=np.float64)
    np.minimum(np.maximum(cells, -_LARGEST, out=cells), _LARGEST, out=cells)
    return np.rint(cells, out=cells)


def add_whole_normal(total: Tensor, grid: float, key: CipherKey, divisor: float = 1.0) -> None:
    """Replace the contiguous `total` by (whole cells + floor of normal noise + 1/2) / (grid * divisor).

    The half makes up for the floor. Sums of other devices are noised on the CPU, where floor and cipher are.
    """
    host = total.detach().cpu()
    flat = host.view(-1).numpy()

    def run(part: int) -> None:
        values = flat[part * PART : (part + 1) * PART]
        noise = whole_normals(values.size, key.stream(part))
        for start in range(0, values.size, _CHUNK):
            piece = values[start : start + _CHUNK]
            piece[...] = centred(whole(piece, grid), noise[start : start + _CHUNK], grid * divisor)

    in_parts(run, flat.size)
    if total.device.type != "cpu":
        total.copy_(host)


def centred(cells: NDArray[np.float64], noise: NDArray[np.int64], scale: float) -> NDArray[np.float64]:
    """(cells + noise + 1/2) / scale, in the array of `cells`: whole numbers below 2^52 add without rounding."""
    cells += noise
    cells += 0.5
    cells /= scale
    return cells


def in_parts(run: Callable[[int], None], size: int) -> None:
    """Call `run` with the number of each part of `size` coordinates, on as many threads as torch uses."""
    # Each part has a stream of its own, so that the noise does not depend on the number of threads.
    count = -(-size // PART)
    threads = min(count, torch.get_num_threads(), os.cpu_count() or 1)
    if threads <= 1:
        for part in range(count):
            run(part)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(count)))


def gridded(mechanism: object, rounding: float = ROUNDING) -> GridGaussianMechanism:
    """`mechanism` on a grid; refuses one whose noise is not normal."""
    if isinstance(mechanism, GridGaussianMechanism):
        return mechanism
    # A subclass may release otherwise, which a grid would pass over.
    if isinstance(mechanism, GaussianMechanism) and type(mechanism) is GaussianMechanism:
        return GridGaussianMechanism(mechanism, rounding)
    if isinstance(mechanism, GroupGaussianMechanism) and type(mechanism) is GroupGaussianMechanism:
        return GridGaussianMechanism(mechanism, rounding)
    raise ValueError(
        f"expected a GaussianMechanism or a GroupGaussianMechanism under secure randomness; got "
        f'{type(mechanism).__name__}, whose noise has no exact sampler; use randomness="fast"'
    )
