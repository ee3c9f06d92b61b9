# SPDX-License-Identifier: Apache-2.0
"""Public schedules: a clip norm and a noise multiplier that change from step to step, fixed before the data are seen.

References: Yu et al. (2019), arXiv:1904.02200 (noise that falls); Du et al. (2021), arXiv:2111.00173 (both).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from clipping import ClipRule, Contribution, FlatClipper
from clipping.clippers.clipper import check_clip_norm
from dpopt.estimators.estimator import Factors, renewed, sampled
from dpopt.estimators.stage import Stage
from dpopt.mechanisms.group_gaussian import Allocation


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Clip norm and noise multiplier that move geometrically over `steps` steps, then stay.

    The clip norm goes from `clip_norm` to `clip_norm * clip_end`, the noise multiplier z to z * noise_end. Each step is
    charged with the noise that it gets. A run that continues one of `start` steps goes on from there.

    Guarantees
    ----------
    The schedule is public and fixed in advance, so the steps compose as mechanisms of their own noise multipliers
    (test_guarantee_each_step_is_charged_with_its_own_noise).
    """

    clip_norm: float
    steps: int
    clip_end: float = 1.0
    noise_end: float = 1.0
    rule: ClipRule = FlatClipper
    start: int = 0
    allocation: Allocation | None = field(default=None, init=False, repr=False)
    speaks_of_zero: bool = field(default=False, init=False, repr=False)
    fresh = renewed
    event = sampled

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        ends = (self.clip_end, self.noise_end)
        if not all(math.isfinite(x) and x > 0 for x in ends) or self.steps < 1:
            raise ValueError(
                f"expected clip_end and noise_end > 0 and steps >= 1; got {ends} and {self.steps}; noise_end=0.7 ends "
                "with 0.7 of the first step's noise"
            )

    @property
    def guarantee(self) -> str:
        """What one step costs."""
        return (
            "clip norm and noise follow a public schedule, and each step is charged as the Gaussian mechanism "
            "of its own noise, on one draw"
        )

    @property
    def setting(self) -> Mapping[str, float | str | None]:
        """Name and public numbers."""
        held = {"steps": self.steps, "clip_end": self.clip_end, "noise_end": self.noise_end}
        return {"name": "schedule", "clip_norm": self.clip_norm, **held}

    @property
    def factors(self) -> Factors | None:
        """The noise of each step, over that of the first."""
        return None if self.noise_end == 1 else lambda step: self._at(self.noise_end, step)

    def starting(self, step: int) -> Scheduled:
        """The same schedule, from its step number `step` on."""
        return replace(self, start=step)

    def stage(self, step: int) -> Stage:
        """One with the clip norm of that step."""
        clipper = self.rule(self.clip_norm * self._at(self.clip_end, step))
        return Stage(Contribution(clipper), lambda released: released, direct=True)

    def _at(self, end: float, step: int) -> float:
        # A hundred values at most: each one more is a curve of its own to the accountant.
        done = min(1.0, (self.start + step) / max(1, self.steps - 1))
        return end ** (round(done * 100) / 100)
