# SPDX-License-Identifier: Apache-2.0
"""Gradients whose coordinates are clamped one by one: what coordinate-wise (l1, median) clipping sums.

The law of this file: a `Clamped` means its formed gradients, each coordinate in [-bound, bound], of which it never
holds more than a chunk.

Shapes: B examples.

References: Schaipp et al. (2024), arXiv:2402.12828 (CClip, from the l1 proximal step).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipping.gradients.dense import Dense
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.grams import Workspace
from clipping.rounding.norms import HALVES, ROUNDING, chunks, flat_rows, per_example, row_norm, widen


@dataclass(frozen=True, slots=True, eq=False)
class Clamped:
    """`grads` with each coordinate of each example clamped to [-bound, bound]; an infinite bound clamps nothing.

    No product of inputs and output gradients tells a clamped coordinate, so examples are formed, a chunk of
    CHUNK_ELEMENTS numbers at a time (at least one example), measured, and formed again to be summed.

    Guarantees
    ----------
    An example's norm is at most bound * sqrt(number of coordinates), since each coordinate is at most `bound`,
    rounded down to the dtype (test_guarantee_a_clamped_norm_is_at_most_the_corner). Below that it is rounded up
    by the error of the forming, which clamping does not enlarge. An example with a coordinate that is not finite
    has the norm inf: clamped, an overflow would pass for a coordinate of known sign.
    """

    grads: SampleGrads
    bound: float

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(
                f"expected a bound > 0 on each coordinate; got {self.bound}; choose the largest size that one "
                "coordinate of one example may have"
            )

    @property
    def num_examples(self) -> int:
        """B."""
        return self.grads.num_examples

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        return self.grads.shape

    def dense(self) -> Tensor:
        """(B, *shape)."""
        values = widen(self.grads.dense())
        limit = _below(self.bound, values.dtype)
        return values.clamp(-limit, limit)

    def _chunks(self) -> Iterator[tuple[slice, Clamped]]:
        for examples in chunks(self.num_examples, self.shape.numel()):
            yield examples, self.part(examples)

    def sq_norm(self, space: Workspace | None = None) -> Tensor:
        """(B,); `space` is not used."""
        parts = [part._formed_sq_norm() for _, part in self._chunks()]
        return torch.cat(parts) if parts else self.grads.rounding()

    def _formed_sq_norm(self) -> Tensor:
        values = widen(self.grads.dense())
        limit = _below(self.bound, values.dtype)
        finite = torch.isfinite(flat_rows(values)).all(1)
        formed = row_norm(values.clamp(-limit, limit))
        # A few epsilons of the terms, as any formed norm: a second forming may round otherwise. No coordinate
        # leaves the box for that.
        error = ROUNDING / HALVES * self.grads.rounding()
        error = torch.minimum(error, (self._corner(limit) - formed).clamp_min(0))
        return torch.where(finite, (formed + error).square(), torch.inf)

    def inner(self, direction: Tensor) -> Tensor:
        """(B,)."""
        each = per_example(direction, self.shape)
        parts = [
            Dense(part.dense()).inner(direction[examples] if each else direction)
            for examples, part in self._chunks()
        ]
        return torch.cat(parts) if parts else self.grads.inner(direction)

    def weighted_sum(
        self, weights: Tensor, into: Tensor | None = None, space: Workspace | None = None
    ) -> Tensor:
        """(*shape); `space` is not used."""
        for examples, part in self._chunks():
            into = Dense(part.dense()).weighted_sum(weights[examples], into)
        return self.grads.weighted_sum(weights, into) if self.num_examples == 0 or into is None else into

    def masked(self, keep: Tensor) -> Clamped:
        """Gradients of examples outside `keep` set to zero."""
        return Clamped(self.grads.masked(keep), self.bound)

    def part(self, examples: slice) -> Clamped:
        """Gradients of a slice of the batch."""
        return Clamped(self.grads.part(examples), self.bound)

    def rounding(self) -> Tensor:
        """(B,): that of the forming and, no larger, that of the inner product."""
        return 2 * self.grads.rounding()

    def _corner(self, limit: float) -> float:
        return limit * math.sqrt(self.shape.numel())


def _below(bound: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` that is at most `bound`."""
    # Rounded to nearest, 0.1 becomes more than 0.1, and a sum of sensitivity 0.1 sqrt(d) would exceed it.
    limit = torch.tensor(bound, dtype=dtype, device="cpu")
    return float(limit if float(limit) <= bound else limit.nextafter(torch.zeros_like(limit)))
