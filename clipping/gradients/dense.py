# SPDX-License-Identifier: Apache-2.0
"""Per-example gradients held as they are, one tensor of the parameter's shape for each example."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipping.rounding.norms import flat_rows, kept, rounding_of, row_norm, row_sq_norm, widen


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """Gradients held as they are, (B, *shape): biases, norms, and layers whose gradients are small.

    `why` says how they were found, where there was a choice.
    """

    values: Tensor
    why: str = "one path"

    @property
    def num_examples(self) -> int:
        """B."""
        return self.values.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        return self.values.shape[1:]

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self.values

    def sq_norm(self) -> Tensor:
        """(B,)."""
        return row_sq_norm(self.values)

    def inner(self, direction: Tensor) -> Tensor:
        """(B,)."""
        values = widen(self.values)
        # A matrix times a vector adds one number after the other: over 2^24 of them, float32 loses 2.7%.
        return flat_rows(values * direction.to(values.dtype)).sum(1)

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(*shape)."""
        values = flat_rows(widen(self.values))
        total = (weights.to(values.dtype) @ values).view(self.values.shape[1:])
        return total if into is None else into.add_(total)

    def masked(self, keep: Tensor) -> Dense:
        """Gradients of examples outside `keep` set to zero."""
        return Dense(kept(self.values, keep))

    def part(self, examples: slice) -> Dense:
        """Gradients of a slice of the batch."""
        return Dense(self.values[examples])

    def rounding(self) -> Tensor:
        """(B,): relative to the norm, there being one term."""
        return rounding_of(row_norm(self.values), 1)
