# SPDX-License-Identifier: Apache-2.0
"""Adaptive clipping: a clip norm that follows the norms of the gradients, as told by noisy counts that are paid for.

| | the count | its price |
|---|---|---|
| `Quantile` | examples below the clip norm, as +- 1/2 | a share of each step's budget |
| `Slack` | examples in each of a few ranges below the clip norm | nothing: short gradients leave room in the ball |

The clip norm of a step is a function of earlier releases, and the noise multiplier is fixed: the ordinary composition
holds. The divisor is the expected batch size, never the drawn one.

References: Andrew et al. (2021), arXiv:1905.03871, algorithm 1 (quantile; centred counts: McMahan et al. 2018,
arXiv:1812.06210, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipping import Contribution, FlatClipper
from clipping.clippers import check_clip_norm
from dpopt.estimators.estimator import Factors, renewed, sampled
from dpopt.estimators.stage import Stage, Vectors
from dpopt.mechanisms.grouped import Allocation

_COUNT = "count:below"
_LEAST = 1e-8


@dataclass(frozen=True, slots=True)
class Below:
    """+ 1/2 for an example whose norm is at most `threshold`, else - 1/2."""

    threshold: float

    @property
    def size(self) -> int:
        """One number."""
        return 1

    @property
    def row(self) -> int:
        """The first group: that of the whole model."""
        return 0

    @property
    def sensitivity(self) -> float | None:
        """1/2: the centre halves it, where an example is added or removed."""
        return 0.5

    def values(self, norms: Tensor) -> Tensor:
        """(B,) norms to (B, 1) numbers."""
        return (norms <= self.threshold).to(norms.dtype).sub_(0.5).unsqueeze(1)


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


@dataclass(slots=True)
class Level:
    """Public state: the clip norm of the next step, and the fractions that the last release told."""

    clip_norm: float
    fractions: tuple[float, ...] = ()


def followed(
    clip_norm: float, fraction: float, target: float, rate: float, most: float, least: float = _LEAST
) -> float:
    """The clip norm after a step in which about `fraction` of the norms lay below: towards `target`."""
    factor = math.exp(-rate * (min(1.0, max(0.0, fraction)) - target))
    return min(most, max(clip_norm * factor, least))


@dataclass(frozen=True, slots=True)
class Quantile:
    """Moves the clip norm towards the `target` quantile of the gradients' norms, geometrically by `rate`.

    `share` of each step's budget pays for the count. The clip norm stays between `least` and `most`;
    `level` holds the present one.

    Guarantees
    ----------
    Gradient and count are one Gaussian mechanism on one draw, of the noise multiplier z of the step:
    (C_t / s)^2 + (1 / (2 s_count))^2 = 1 / z^2 for every C_t (test_guarantee_the_count_is_paid_for). Adding or removing
    an example moves the count by 1/2, replacing it by 1: twice, as every contribution.
    """

    clip_norm: float
    target: float = 0.5
    rate: float = 0.05
    share: float = 0.01
    most: float = math.inf
    least: float = _LEAST
    level: Level = field(init=False, compare=False)
    factors: Factors | None = field(default=None, init=False, repr=False)
    speaks_of_zero: bool = field(default=True, init=False, repr=False)
    fresh = renewed
    event = sampled

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        object.__setattr__(self, "level", Level(self.clip_norm))
        _check(self.target, self.rate, self.most)
        if not 0 < self.least < self.most:
            raise ValueError(
                f"expected 0 < least < most; got {self.least} and {self.most}; leave room for the clip norm to move"
            )
        if not 0 < self.share < 1:
            raise ValueError(
                f"expected 0 < share < 1 of the budget for the count; got {self.share}; 0.01 is usual"
            )

    @property
    def guarantee(self) -> str:
        """What one step costs."""
        return (
            f"the clip norm follows the {self.target:g} quantile by a noisy count, which takes {self.share:.1%} of each "
            "step's budget: each step is the Gaussian mechanism on one draw"
        )

    @property
    def setting(self) -> Mapping[str, float | str | None]:
        """Name and public numbers."""
        bounds = {"most": self.most} if math.isfinite(self.most) else {}
        bounds |= {"least": self.least} if self.least != _LEAST else {}
        return {"name": "quantile", "target": self.target, "rate": self.rate, "share": self.share, **bounds}

    @property
    def allocation(self) -> Allocation | None:
        """A share for the count, the rest for the gradient."""
        return self._shares

    def stage(self, step: int) -> Stage:
        """One at the clip norm as it is."""
        counts = {_COUNT: Below(self.level.clip_norm)}
        return Stage(
            Contribution(FlatClipper(self.level.clip_norm), counts=counts), self._finish, direct=True
        )

    def _shares(self, sensitivities: Sequence[float], sizes: Sequence[int]) -> Sequence[float]:
        return 1 - self.share, self.share

    def _finish(self, released: Vectors) -> Vectors:
        fraction = released[_COUNT].item() + 0.5
        level = self.level
        level.fractions = (fraction,)
        level.clip_norm = followed(level.clip_norm, fraction, self.target, self.rate, self.most, self.least)
        return {name: value for name, value in released.items() if name != _COUNT}


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
        _check(self.target, self.rate, self.most)
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
            numbers = released[_COUNT].tolist()
            counts = [n / height for n, height in zip(numbers, ranges.heights, strict=True)]
            level.fractions = tuple(math.fsum(counts[: j + 1]) for j in range(len(counts)))
            level.clip_norm = followed(clip_norm, level.fractions[-1], self.target, self.rate, self.most)
            return {name: value for name, value in released.items() if name != _COUNT}

        return Stage(Contribution(FlatClipper(clip_norm), counts={_COUNT: ranges}), finish, direct=True)


def _check(target: float, rate: float, most: float) -> None:
    if not (0 < target < 1 and 0 < rate < math.inf and most > 0):
        raise ValueError(
            f"expected 0 < target < 1, a finite rate > 0 and most > 0; got {target}, {rate} and {most}; 0.5 follows the "
            "median, and 0.05 is a usual rate"
        )
