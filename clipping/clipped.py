# SPDX-License-Identifier: Apache-2.0
"""A clipped sum that carries its own sensitivity: noise asks the sum, never a configuration number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ClippedSum:
    """Sum over examples of clipped gradients, per parameter name, float32 or float64.

    Guarantees
    ----------
    Adding or removing one example moves `total`, taken over all parameters together, by at most `sensitivity`
    in Euclidean norm. The sum of two such sums over *disjoint* examples has the same sensitivity, which is why
    `+` keeps it; adding the same example twice is the caller's error, and the private step counts examples.
    """

    total: Mapping[str, Tensor]
    sensitivity: float

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """The clipped sum over the examples of both (micro-batches, ranks)."""
        if self.sensitivity != other.sensitivity or set(self.total) != set(other.total):
            raise ValueError(
                "expected two clipped sums of the same parameters and sensitivity; got "
                f"{len(self.total)} parameters at {self.sensitivity} and {len(other.total)} at "
                f"{other.sensitivity}; change the clipper or the trainable parameters only between releases"
            )
        total = {name: value + other.total[name] for name, value in self.total.items()}
        return ClippedSum(total, self.sensitivity)


def zero_sum(parameters: Mapping[str, Tensor], sensitivity: float) -> ClippedSum:
    """The clipped sum over no example: what an empty Poisson batch contributes."""
    total = {
        name: torch.zeros_like(
            parameter, dtype=torch.float64 if parameter.dtype == torch.float64 else torch.float32
        )
        for name, parameter in parameters.items()
    }
    return ClippedSum({name: value.detach() for name, value in total.items()}, sensitivity)
