# SPDX-License-Identifier: Apache-2.0
"""What the paths to a norm and a sum cost on a device, and the choice between them.

Three paths lead from inputs and output gradients to norms and the weighted sum: the Gram matrices of the
positions; per-example gradients formed, measured and dropped; per-example gradients formed once and kept, so
that norm and sum share them. Times are counted in multiply-adds of a batched matrix product.

Shapes: B examples, K groups, T positions, P outputs, D inputs.

References: Bu et al. (2022), arXiv:2210.00038, section 3 (a choice for each layer, by memory); here by time
under a cap on memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

GRAM_SHARE = 0.65
"""Part of a symmetric Gram matrix that is computed."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What decides between the paths, on one device.

    `traffic` is the cost of reading or writing one number of a formed gradient, in multiply-adds of a batched
    product. `keep_memory` caps the size of a kept gradient, in sizes of the inputs and output gradients that
    it replaces.
    """

    traffic: float = 8.0
    keep_memory: float = 2.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.traffic) and self.traffic > 0 and self.keep_memory >= 0):
            raise ValueError(
                f"expected traffic > 0 and keep_memory >= 0; got {self.traffic} and {self.keep_memory}; leave them "
                "out, or use measured(device)"
            )


DEFAULT = Costs()
"""As measured on x86 cores."""


class Sizes(NamedTuple):
    """The sizes of one parameter's gradient: K, T, P, D, and the numbers held for an example as they are."""

    num_groups: int
    num_positions: int
    num_out: int
    num_in: int
    held: int

    @property
    def formed(self) -> int:
        """Numbers of one example's gradient."""
        return self.num_groups * self.num_out * self.num_in


class Choice(NamedTuple):
    """The path taken for one parameter, and why; costs in multiply-adds for an example, beside the sum's own."""

    path: str
    why: str


@lru_cache(maxsize=4096)
def choose(sizes: Sizes, costs: Costs) -> Choice:
    """The fastest path for a gradient of these sizes whose memory is under the cap.

    The product that the weighted sum needs anyway is not counted; keeping moves it to the forming.
    """
    num_groups, positions, num_out, num_in, held = sizes
    gram = GRAM_SHARE * num_groups * positions**2 * (num_out + num_in + 4 * costs.traffic)
    drop = positions * sizes.formed + 2 * costs.traffic * sizes.formed
    keep = 3 * costs.traffic * sizes.formed
    said = f"gram {gram:.2g}, form and drop {drop:.2g}, keep {keep:.2g} multiply-adds"
    if keep < min(gram, drop) and positions > 1:
        if sizes.formed <= costs.keep_memory * held:
            return Choice("form and keep", said)
        said += f"; kept, {sizes.formed} numbers would replace {held}, above the cap x{costs.keep_memory:g}"
    if positions == 1:
        return Choice("product of two norms", "one position")
    return Choice("gram" if gram <= drop else "form and drop", said)


def _seconds(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)  # the least disturbed by other work on the machine


@lru_cache(maxsize=8)
def measured(device: torch.device) -> Costs:
    """The costs of `device`, measured once in this process on shapes of a small transformer (about 0.1 s).

    Rounded to a power of two, so that a busy machine hardly changes a choice. Looks at no data.
    """
    size = 8 if device.type == "cpu" else 64
    left = torch.ones(size, 128, 384, device=device)
    formed = torch.ones(size, 8 * 384 * 384, device=device)  # beyond the caches, as a layer's gradients are
    weights = torch.ones(size, device=device)
    product = _seconds(lambda: torch.matmul(left, left.mT), device) / (size * 128 * 128 * 384)
    reading = _seconds(lambda: weights @ formed, device) / formed.numel()
    traffic = 2.0 ** round(math.log2(min(512.0, max(1.0, reading / product))))
    return Costs(traffic=traffic)
