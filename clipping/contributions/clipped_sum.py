# SPDX-License-Identifier: Apache-2.0
"""A clipped sum that carries its own sensitivity: noise asks the sum, never a configuration number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clipping.clippers.clipper import Clipper


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters clipped together, and the most that one example moves their clipped sum."""

    names: tuple[str, ...]
    sensitivity: float


@dataclass(frozen=True, slots=True, eq=False)
class ClippedSum:
    """Sum over examples of clipped gradients, per parameter name, float32 or float64.

    `groups`, where known, hold each parameter of `total` once.

    Guarantees
    ----------
    Adding or removing one example moves `total`, taken over all parameters together, by at most `sensitivity`
    in Euclidean norm, and within each of `groups` by at most that group's. The sum of two such sums over
    *disjoint* examples has the same sensitivities, which is why `+` keeps them; adding the same example twice is
    the caller's error, and the private step counts examples.
    """

    total: Mapping[str, Tensor]
    sensitivity: float
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        listed = sorted(name for group in self.groups for name in group.names)
        if self.groups and listed != sorted(self.total):
            odd = sorted(set(listed) ^ set(self.total)) or listed
            raise ValueError(
                f"expected groups that hold each parameter of the sum once; got a difference at {odd[:5]}; build them "
                "with sum_groups(clipper, names)"
            )

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """The clipped sum over the examples of both (micro-batches, ranks)."""
        if (self.sensitivity, self.groups) != (other.sensitivity, other.groups) or set(self.total) != set(
            other.total
        ):
            raise ValueError(
                "expected two clipped sums of the same parameters and sensitivity; got "
                f"{len(self.total)} parameters at {self.sensitivity} and {len(other.total)} at "
                f"{other.sensitivity}; change the clipper or the trainable parameters only between releases"
            )
        total = {name: value + other.total[name] for name, value in self.total.items()}
        return ClippedSum(total, self.sensitivity, self.groups)


def sum_groups(clipper: Clipper, groups: tuple[tuple[str, ...], ...]) -> tuple[Group, ...]:
    """The groups of a sum clipped by `clipper`, whose groups of parameter names are `groups`."""
    return tuple(Group(names, bound) for names, bound in zip(groups, clipper.clip_norms, strict=True))


def zero_sum(parameters: Mapping[str, Tensor], sensitivity: float) -> ClippedSum:
    """The clipped sum over no example: what an empty Poisson batch contributes."""
    total = {
        name: torch.zeros_like(
            parameter, dtype=torch.float64 if parameter.dtype == torch.float64 else torch.float32
        )
        for name, parameter in parameters.items()
    }
    return ClippedSum({name: value.detach() for name, value in total.items()}, sensitivity)
