# SPDX-License-Identifier: Apache-2.0
"""A clip norm that follows a quantile by counts that cost nothing: short gradients leave room in the ball."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipping import Contribution, FlatClipper
from clipping.clippers.clipper import check_clip_norm
from dpopt.estimators.clip_norm_tracking import COUNT, Level, check_tracking, followed
from dpopt.estimators.estimator import Factors, renewed, sampled
from dpopt.estimators.stage import Stage, Vectors
from dpopt.mechanisms.group_gaussian import Allocation


@dataclass(frozen=True, slots=True)
class Ranges:
    """Where an example's norm lies below `clip_norm`: number j is not 0 if it is the first with norm <= edge j.

    `edges` are J increasing norms below `clip_norm`. The number is sqrt(clip_norm^2 - edge^2), which is the room
    that such a gradient leaves in the ball of radius `clip_norm`.
    """

    clip_norm: float
    edges: tuple[float, ...]

    @property
    def size(self) -> int:
        """J."""
        return len(self.edges)

    @property
    def row(self) -> int:
        """The first group: that of the whole model."""
        return 0

    @property
    def sensitivity(self) -> float | None:
        """None: gradient and numbers of an example together have norm at most `clip_norm`."""
        return None

    @property
    def heights(self) -> tuple[float, ...]:
        """The number that each range has."""
        return tuple(math.sqrt(self.clip_norm**2 - edge**2) * (1 - 1e-6) for edge in self.edges)

    def values(self, norms: Tensor) -> Tensor:
        """(B,) norms to (B, J) numbers, at most one of a row not 0."""
        edges = norms.new_tensor(self.edges)
        index = torch.bucketize(norms.nan_to_num(torch.inf, torch.inf, torch.inf), edges)
        heights = norms.new_tensor((*self.heights, 0.0))
        chosen = torch.nn.functional.one_hot(index, len(self.edges) + 1).to(norms.dtype)
        return (chosen * heights)[:, :-1]


@dataclass(frozen=True, slots=True)
class Slack:
    """As `Quantile`, by counts that cost nothing: a gradient shorter than the clip norm leaves room for a number.

    `edges`, in parts of the clip norm, are where the distribution of norms is told; `level.fractions` holds the
    last one, and `target` is what shall lie below the last edge.

    Guarantees
    ----------
    Each example's gradient and numbers, together, have norm at most the clip norm, so they are released by the
    Gaussian mechanism of the plain clipped sum, with the same noise
    (test_guarantee_gradient_and_slack_stay_within_the_clip_norm).
    """

    clip_norm: float
    target: float = 0.5
    rate: float = 0.05
    edges: tuple[float, ...] = (0.4, 0.7)
    most: float = math.inf
    level: Level = field(init=False, compare=False)
    allocation: Allocation | None = field(default=None, init=False, repr=False)
    factors: Factors | None = field(default=None, init=False, repr=False)
    speaks_of_zero: bool = field(default=True, init=False, repr=False)
    fresh = renewed
    event = sampled

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        object.__setattr__(self, "level", Level(self.clip_norm))
        check_tracking(self.target, self.rate, self.most)
        rising = all(a < b for a, b in zip((0.0, *self.edges), (*self.edges, 1.0), strict=True))
        if not (self.edges and rising):
            raise ValueError(f"expected edges that rise between 0 and 1; got {self.edges}; use (0.4, 0.7)")

    @property
    def guarantee(self) -> str:
        """What one step costs."""
        return (
            f"the clip norm follows the {self.target:g} quantile by counts that share the ball of the clipped gradient: "
            "each step is the Gaussian mechanism on one draw, at no price for the counts"
        )

    @property
    def setting(self) -> Mapping[str, float | str | None]:
        """Name and public numbers."""
        return {"name": "slack", "target": self.target, "rate": self.rate, "edges": repr(self.edges)}

    def stage(self, step: int) -> Stage:
        """One at the clip norm as it is."""
        level, clip_norm = self.level, self.level.clip_norm
        ranges = Ranges(clip_norm, tuple(edge * clip_norm for edge in self.edges))

        def finish(released: Vectors) -> Vectors:
            numbers = released[COUNT].tolist()
            counts = [n / height for n, height in zip(numbers, ranges.heights, strict=True)]
            level.fractions = tuple(math.fsum(counts[: j + 1]) for j in range(len(counts)))
            level.clip_norm = followed(clip_norm, level.fractions[-1], self.target, self.rate, self.most)
            return {name: value for name, value in released.items() if name != COUNT}

        return Stage(Contribution(FlatClipper(clip_norm), counts={COUNT: ranges}), finish, direct=True)
