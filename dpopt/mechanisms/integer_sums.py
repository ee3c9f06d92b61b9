# SPDX-License-Identifier: Apache-2.0
"""Integer clipping: sums of whole numbers, exact in any order, of examples whose norm is checked after rounding.

A sum of floats rounds by what else is in it, so its sensitivity is a bound on errors, not a fact. Here one example's
clipped gradient is cut to whole cells first, and *those* are added, in 64-bit integers. It takes each example's own
gradient, one example to a backward: the price of having nothing left to assume about sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipping import ClippedSum
from dpopt.mechanisms.grid_gaussian import (
    PART,
    Cells,
    CipherSource,
    GridGaussianMechanism,
    cipher_of,
    fineness,
    in_parts,
)
from dpopt.randomness.cipher import CipherKey
from dpopt.randomness.ziggurat import SCALE, whole_normals

LEAST_RATIO = 2.0**-6
"""With less noise than this part of the sensitivity, sums of 2^28 examples might leave 64 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class WholeSum:
    """Sum over examples of whole vectors, int64 on the CPU; `groups` tell the norm that each example kept to.

    Guarantees
    ----------
    Each example's vector has Euclidean norm at most SCALE / ratio within each of `groups`, and is a function of that
    example and of public numbers alone; sums are exact, so adding or removing an example moves them by just that
    (test_guarantee_whole_examples_keep_to_the_radius, test_whole_sums_do_not_depend_on_the_order).
    """

    total: Mapping[str, Tensor]
    groups: tuple[Cells, ...]
    dtype: torch.dtype

    def __add__(self, other: WholeSum) -> WholeSum:
        """The sum over the examples of both."""
        if (self.groups, self.dtype) != (other.groups, other.dtype):
            raise ValueError(
                f"expected two sums on the same grid; got {self.groups} and {other.groups}; change clipper and "
                "mechanism only between releases"
            )
        total = {name: value + other.total[name] for name, value in self.total.items()}
        return WholeSum(total, self.groups, self.dtype)


def whole_example(clipped: ClippedSum, mechanism: GridGaussianMechanism) -> WholeSum:
    """The clipped gradient of *one* example (or of none) in whole cells, cut toward zero, which lengthens nothing."""
    groups = mechanism.cells(clipped)
    total: dict[str, Tensor] = {}
    for group in groups:
        if not group.ratio >= LEAST_RATIO:
            raise ValueError(
                f"expected noise of at least {LEAST_RATIO:g} of the sensitivity on whole numbers; got "
                f"{group.ratio:g}; raise the noise multiplier"
            )
        values = {
            name: clipped.total[name].detach().cpu().contiguous().double().numpy() for name in group.names
        }
        cut = _within(values, fineness(group.sensitivity, group.ratio, 0, 0.0), SCALE / group.ratio)
        total |= {name: torch.from_numpy(value) for name, value in cut.items()}
    wide = any(value.dtype == torch.float64 for value in clipped.total.values())
    return WholeSum(total, groups, torch.float64 if wide else torch.float32)


def _within(
    values: Mapping[str, NDArray[np.float64]], grid: float, radius: float
) -> dict[str, NDArray[np.int64]]:
    """`values` * grid, cut toward zero, shortened where floats had let them grow beyond `radius`."""
    count = sum(value.size for value in values.values())
    # A float64 sum of d squares, in any order, is short by at most (d + 1) 2^-53 of itself (Higham 2002, section 3.1).
    most = radius * radius * (1 - (count + 4) * 2.0**-52)
    while True:
        cut = {name: np.trunc(value * grid) for name, value in values.items()}
        found = sum(float(np.square(value).sum()) for value in cut.values())
        if found <= most:
            return {name: value.astype(np.int64) for name, value in cut.items()}
        grid = grid * (most / found) ** 0.5 * (1 - 2.0**-30) if np.isfinite(found) else 0.0
        if grid == 0:
            return {name: np.zeros(value.shape, dtype=np.int64) for name, value in values.items()}


def release_whole(summed: WholeSum, noise: CipherSource, divisor: float = 1.0) -> dict[str, Tensor]:
    """The noisy sum over `divisor`.

    Guarantees
    ----------
    Given uniform words, a function of the Gaussian mechanism of `mechanism.event()`; nothing about floats is assumed.
    """
    released = {}
    for group in summed.groups:
        scale = fineness(group.sensitivity, group.ratio, 0, 0.0) * divisor
        for name in group.names:
            total = summed.total[name]
            out = torch.empty(total.shape, dtype=summed.dtype, device="cpu")
            _noised(total.view(-1).numpy(), out.view(-1).numpy(), cipher_of(noise, name, total.device), scale)
            released[name] = out
    return released


def _noised(cells: NDArray[np.int64], out: NDArray[np.floating], key: CipherKey, scale: float) -> None:
    def run(part: int) -> None:
        piece = cells[part * PART : (part + 1) * PART]
        noisy = whole_normals(piece.size, key.stream(part)) + piece
        out[part * PART : (part + 1) * PART] = (noisy + 0.5) / scale

    in_parts(run, cells.size)
