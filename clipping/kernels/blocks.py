# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the kernels, and the rounding error that follows from them.

Shapes: L terms of an inner product, summed in runs of `width`.

References: Fasi et al. (2021), "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330 (exact products,
aligned and truncated sums); Higham (2002), Accuracy and Stability of Numerical Algorithms, section 4.2 (a sum of
n roundings to nearest errs by n / 2 epsilons at most).
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

EPSILON = torch.finfo(torch.float32).eps

RUN_EPSILONS = 48
"""Worst error of one run of at most 64 terms, in epsilons of the sum of its terms' magnitudes.

A tensor core multiplies bfloat16 and float16 exactly, aligns 8 or 16 products and the accumulator to the
largest of them, and truncates each at its last bits: at most 6 epsilons of the largest per step, with 8 terms
per step (A100: one extra bit, 9 addends: 4.5 + 1) as with 16 (if they have two extra bits, 17 addends: 4.25 + 1;
an assumption for newer generations, which test_guarantee_one_run_errs_by_less_than_its_bound measures on a
device). Truncation is one-sided, so it adds up: 64 / 8 steps of 6. Float32 runs of 32 fused multiply-adds round
to nearest: 16.
"""

SUM_EPSILONS = 40
"""Worst error of the sum over one tile of 128 x 128: 64 terms in each of 256 threads, then a tree of 8."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """`tile` x `tile` results per program, `width` terms per run; powers of two from 16 on."""

    tile: int
    width: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        good = all(size >= 16 and size & (size - 1) == 0 for size in (self.tile, self.width))
        if not good or self.tile > 128 or self.width > 64:
            raise ValueError(
                "expected a tile of 16 to 128 and a width of 16 to 64, powers of two; got "
                f"tile={self.tile}, width={self.width}; the rounding bounds of clipping.kernels.blocks need them"
            )

    def rounding(self, length: int) -> float:
        """Bound on |error| / sum of magnitudes of an inner product of `length` terms.

        Within a run: RUN_EPSILONS, whatever the length, since each run errs relative to its own terms. Between
        runs, sums are ordinary float32 additions that round to nearest (the kernels keep them out of the
        tensor core): half an epsilon each. All may round one way, where an example is made for it.
        """
        return EPSILON * (RUN_EPSILONS + 0.5 * math.ceil(length / self.width))


def blocks_for(dtype: torch.dtype, extent: int) -> Blocks:
    """Blocks for inputs of `dtype` whose results are `extent` wide at most."""
    full = 64 if dtype == torch.float32 else 128
    tile = min(full, max(16, 1 << max(0, extent - 1).bit_length()))
    if dtype == torch.float32:
        return Blocks(tile, 32, 4, 2)
    return Blocks(tile, 64, 8 if tile == 128 else 4, 3)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the one that launches go to: triton takes the current device, whatever its tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
