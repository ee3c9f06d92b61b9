# SPDX-License-Identifier: Apache-2.0
"""Two thresholds: what clipping cuts off is clipped again, averaged over time, and given back.

    k_i = clip(g_i, C1),  r_i = clip(g_i - k_i, C2),  on the same batch
    s1 = (sum k_i + noise) / B,  s2 = (sum r_i + noise) / B,  b <- b + rate (s2 - b),  gradient = s1 + b

The mean of the gradient is that of clipping at C1 + C2, since k_i + r_i = clip(g_i, C1 + C2); its noise is less, since
that of s2 is averaged. The price is a lag: b follows in about 1 / rate steps. All state is public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipping import Contribution, FlatClipper
from clipping.clippers.residual import RestClipper
from dpopt.estimators.estimator import Factors, renewed, sampled
from dpopt.estimators.stage import Stage, Vectors
from dpopt.mechanisms.group_gaussian import Allocation

_REST = "rest:"


@dataclass(frozen=True, slots=True)
class TwoThreshold:
    """Clips at `clip_norm`, what is cut off at `rest`, and averages the second over about 1 / `rate` steps.

    Guarantees
    ----------
    Both sums of a step are one Gaussian mechanism on one draw, of noise multiplier z with
    z^-2 = z1^-2 + z2^-2 (whitening: divide each sum by its noise); averaging is post-processing
    (test_guarantee_two_thresholds_are_one_gaussian). The split 1/z1^2 = f/z^2, f = C1 / (C1 + sqrt(kappa) C2) with
    kappa = rate / (2 - rate), is the best: it minimises the variance z1^2 C1^2 + kappa z2^2 C2^2 of the gradient's
    noise, by Cauchy-Schwarz, to z^2 (C1 + sqrt(kappa) C2)^2 (test_the_split_has_the_least_variance).
    """

    clip_norm: float
    rest: float
    rate: float = 0.1
    average: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)
    factors: Factors | None = field(default=None, init=False, repr=False)
    speaks_of_zero: bool = field(default=False, init=False, repr=False)
    fresh = renewed
    event = sampled

    def __post_init__(self) -> None:
        RestClipper(self.rest, self.clip_norm)
        if not 0 < self.rate <= 1:
            raise ValueError(f"expected 0 < rate <= 1; got {self.rate}; 0.1 averages over about 10 steps")

    @property
    def guarantee(self) -> str:
        """What one step costs."""
        return (
            f"gradients clipped at {self.clip_norm:g} and the rest at {self.rest:g}, in one Gaussian release whose "
            "noise both share: each step is the Gaussian mechanism on one draw; averages of releases are free"
        )

    @property
    def setting(self) -> Mapping[str, float | str | None]:
        """Name and public numbers."""
        return {"name": "two_threshold", "clip_norm": self.clip_norm, "rest": self.rest, "rate": self.rate}

    @property
    def allocation(self) -> Allocation | None:
        """The split of least variance."""
        return self._shares

    def stage(self, step: int) -> Stage:
        """One with the average as it is."""
        rest = RestClipper(self.rest, self.clip_norm)
        return Stage(Contribution(FlatClipper(self.clip_norm), {_REST: rest}), self._finish)

    def _shares(self, sensitivities: Sequence[float], sizes: Sequence[int]) -> Sequence[float]:
        kappa = self.rate / (2 - self.rate)
        return self.clip_norm, math.sqrt(kappa) * self.rest

    def _finish(self, released: Vectors) -> Vectors:
        rest = {n.removeprefix(_REST): value for n, value in released.items() if n.startswith(_REST)}
        if not self.average:
            self.average.update({name: torch.zeros_like(value) for name, value in rest.items()})
        self.average.update({n: torch.lerp(self.average[n], value, self.rate) for n, value in rest.items()})
        return {name: released[name] + value for name, value in self.average.items()}
