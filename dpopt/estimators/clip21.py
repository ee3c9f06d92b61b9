# SPDX-License-Identifier: Apache-2.0
"""Clip21 with a memory of each record: clip what is new in a gradient, so that clipping leaves no bias behind.

    u_i = clip(g_i - h_i, tau),  h_i <- h_i + rate u_i,  gradient <- gradient + rate / N (sum u_i + noise)

for the records i of each batch, N records in all. Once every memory is within tau of its gradient, nothing is
clipped any more. The gradient is a sum of all releases, so its noise grows with the root of the number of
steps: a small rate, or restarts. The memory takes records x parameters numbers.

References: Khirirat et al. (2023), arXiv:2305.18929; Islamov et al. (2025), arXiv:2502.11682.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accountants import Event
from clipping.clippers.clipper import check_clip_norm
from clipping.contributions.record_memory import Memory
from dpopt.estimators.estimator import Factors, renewed
from dpopt.estimators.stage import Stage, Vectors
from dpopt.mechanisms.group_gaussian import Allocation
from dpopt.sampling.poisson import PoissonSampling
from dpopt.sampling.sampler import Sampling


@dataclass(frozen=True, slots=True)
class Clip21:
    """Clips each record's gradient around what it has sent before, and moves both by `rate`.

    `num_records` and `sampling_rate` are public and those of the run. `accumulate` must be told which record each
    row is, and each keeps its place in the dataset for the whole run: do not shuffle the list. Every `restart` steps
    (None: never) the gradient and all memories begin at 0 again.

    Guarantees
    ----------
    The run is dominated by the sampled Gaussian mechanisms of its steps: what a record adds depends on its own
    earlier coins and on releases, and is multiplied by its fresh coin. Given the releases and everybody else's
    coins, a step is a mixture, over what the record's own past may have been, of sampled Gaussian pairs, each
    dominated by the one of sensitivity tau; divergences are jointly convex
    (test_guarantee_a_record_with_memory_is_dominated_by_the_sampled_gaussian). Poisson sampling only.
    """

    clip_norm: float
    num_records: int
    sampling_rate: float
    rate: float = 1.0
    restart: int | None = None
    memory: Memory = field(init=False, repr=False, compare=False)
    gradient: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)
    allocation: Allocation | None = field(default=None, init=False, repr=False)
    factors: Factors | None = field(default=None, init=False, repr=False)
    speaks_of_zero: bool = field(default=False, init=False, repr=False)
    fresh = renewed

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        if not (0 < self.rate <= 1 and self.num_records >= 1 and 0 < self.sampling_rate <= 1):
            raise ValueError(
                "expected 0 < rate <= 1, num_records >= 1 and 0 < sampling_rate <= 1; got "
                f"{self.rate}, {self.num_records}, {self.sampling_rate}; give those of the run"
            )
        if self.restart is not None and self.restart < 1:
            raise ValueError(f"expected restart >= 1 steps or None; got {self.restart}; leave it out")
        object.__setattr__(self, "memory", Memory(self.num_records, self.clip_norm, self.rate))

    @property
    def guarantee(self) -> str:
        """What one step costs."""
        return (
            f"what is new in each record's gradient, clipped to {self.clip_norm:g}; a record's memory is its own and "
            "takes part by its own coin: each step is dominated by the Gaussian mechanism on one draw"
        )

    @property
    def setting(self) -> Mapping[str, float | str | None]:
        """Name and public numbers."""
        return {"name": "clip21", "clip_norm": self.clip_norm, "rate": self.rate, "restart": self.restart}

    def event(self, sampling: Sampling, released: Event) -> Event:
        """That of the sampler, whose coins are fresh in each step."""
        if not isinstance(sampling, PoissonSampling) or sampling.sampling_rate != self.sampling_rate:
            raise ValueError(
                f"expected Poisson sampling at the estimator's rate {self.sampling_rate}; got {sampling}; fresh coins "
                "for each record and step are what the proof needs"
            )
        return sampling.event(released)

    def stage(self, step: int) -> Stage:
        """One with the memories as they are."""
        return Stage(self.memory.contribution(), lambda released: self._finish(step, released))

    def _finish(self, step: int, released: Vectors) -> Vectors:
        self.memory.keep()
        old, factor = self.gradient, self.rate * self.sampling_rate
        found = {n: torch.add(old[n], v, alpha=factor) if old else v * factor for n, v in released.items()}
        self.gradient.update(found)
        if self.restart is not None and (step + 1) % self.restart == 0:
            self.gradient.clear()
            self.memory.clear()
        return {name: value.clone() for name, value in found.items()}
