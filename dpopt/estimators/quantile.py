# SPDX-License-Identifier: Apache-2.0
"""A clip norm that follows a quantile of the gradients' norms, as told by a noisy count that is paid for.

Reference: Andrew et al. (2021), arXiv:1905.03871, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from clipping import Contribution, FlatClipper
from clipping.clippers.clipper import check_clip_norm
from dpopt.estimators.clip_norm_tracking import _LEAST, COUNT, Level, check_tracking, followed
from dpopt.estimators.estimator import Factors, renewed, sampled
from dpopt.estimators.stage import Stage, Vectors
from dpopt.mechanisms.group_gaussian import Allocation


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
        check_tracking(self.target, self.rate, self.most)
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
        counts = {COUNT: Below(self.level.clip_norm)}
        return Stage(
            Contribution(FlatClipper(self.level.clip_norm), counts=counts), self._finish, direct=True
        )

    def _shares(self, sensitivities: Sequence[float], sizes: Sequence[int]) -> Sequence[float]:
        return 1 - self.share, self.share

    def _finish(self, released: Vectors) -> Vectors:
        fraction = released[COUNT].item() + 0.5
        level = self.level
        level.fractions = (fraction,)
        level.clip_norm = followed(level.clip_norm, fraction, self.target, self.rate, self.most, self.least)
        return {name: value for name, value in released.items() if name != COUNT}
