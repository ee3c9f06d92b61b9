# SPDX-License-Identifier: Apache-2.0
"""The gradient of a parameter that a backward did not reach: zero for every example, and nothing held.

Shapes: B examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipping.rounding.norms import accumulator_dtype


@dataclass(frozen=True, slots=True, eq=False)
class Absent:
    """Zero gradients of `parameter` for `num_examples` examples.

    Seen from a centre, zero is a difference like any other. If it were left out where no example of a backward
    reaches a layer, one example that does would change what all others add.
    """

    parameter: Tensor
    num_examples: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        return self.parameter.shape

    def dense(self) -> Tensor:
        """(B, *shape) zeros."""
        return self._zeros(self.num_examples, *self.shape)

    def sq_norm(self) -> Tensor:
        """(B,) zeros."""
        return self._zeros(self.num_examples)

    def inner(self, direction: Tensor) -> Tensor:
        """(B,) zeros."""
        return self._zeros(self.num_examples)

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(*shape): `into`, or zeros."""
        return self._zeros(*self.shape) if into is None else into

    def masked(self, keep: Tensor) -> Absent:
        """Itself."""
        return self

    def part(self, examples: slice) -> Absent:
        """Those of a slice of the batch."""
        return Absent(self.parameter, len(range(*examples.indices(self.num_examples))))

    def rounding(self) -> Tensor:
        """(B,) zeros."""
        return self._zeros(self.num_examples)

    def _zeros(self, *shape: int) -> Tensor:
        dtype = accumulator_dtype(self.parameter.dtype)
        return torch.zeros(shape, dtype=dtype, device=self.parameter.device)
