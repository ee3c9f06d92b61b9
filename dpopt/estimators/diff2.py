# SPDX-License-Identifier: Apache-2.0
"""DIFF2: after a whole gradient, release differences of gradients, which are shorter the shorter the steps are.

    restart:    v = (sum clip(g_i(x), C1) + noise of multiplier z) / B
    otherwise:  v <- v + (sum clip(g_i(x) - g_i(x'), C2 |x - x'|) + noise of multiplier z * ratio) / B

x' are the parameters of the step before; both gradients of an example are taken on the same batch, which costs a second
forward and backward. Where the loss is L-smooth, C2 = L clips nothing. Where C2 |x - x'| reaches C1, a difference would
bring more noise than a whole gradient, so that one is taken, at the noise of that step.

The noise of differences adds up until the next restart, and on top of it lies that of the restart: what is gained is
that restarts are few, so they can have most of the budget. With `ratio` = 1 there is no gain; near the root of
`restart` both kinds of step cost about the same. It pays where steps are short and batches large, as with SGD on a
smooth loss; Adam's steps are long, and small batches make v lag behind.

Reference: Murata and Suzuki (2023), arXiv:2302.03884, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipping import Contribution, FlatClipper
from clipping.clippers.clipper import check_clip_norm
from dpopt.estimators.estimator import Factors, renewed, sampled
from dpopt.estimators.stage import Stage, Vectors
from dpopt.mechanisms.group_gaussian import Allocation


@dataclass(frozen=True, slots=True)
class Difference:
    """Whole gradients every `restart` steps, clipped at `clip_norm`, and differences clipped at smoothness |x - x'|, if less.

    `parameters` gives the trainable parameters by name. `ratio` is the noise multiplier of a difference over that of
    a whole gradient. Steps shorter than `shortest` are taken for that long, so that noise never vanishes with
    the signal.

    Guarantees
    ----------
    Each step is the Gaussian mechanism on a draw: x and x' are functions of releases, so the threshold is public, and
    one example's clipped difference has at most that norm. The noise multipliers z and z * ratio are fixed in
    advance, and each is charged as what it is; at sampling rate 1 that is
    rho = (R/T) / (2 z^2) + (R - R/T) / (2 (z ratio)^2) for R steps with restarts every T
    (test_guarantee_differences_cost_exactly_rho).
    """

    clip_norm: float
    parameters: Callable[[], Mapping[str, Tensor]]
    smoothness: float = 1.0
    restart: int = 10
    ratio: float = 3.0
    shortest: float = 1e-4
    last: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)
    gradient: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)
    allocation: Allocation | None = field(default=None, init=False, repr=False)
    speaks_of_zero: bool = field(default=False, init=False, repr=False)
    fresh = renewed
    event = sampled

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        given = (self.smoothness, self.ratio, self.shortest)
        if not all(math.isfinite(x) and x > 0 for x in given) or self.restart < 1:
            raise ValueError(
                f"expected smoothness, ratio and shortest > 0 and restart >= 1; got {given} and {self.restart}; "
                "smoothness 1, ratio 3 and restart 10 are a start"
            )

    @property
    def guarantee(self) -> str:
        """What one step costs."""
        return (
            f"gradients clipped at {self.clip_norm:g} every {self.restart} steps and differences clipped at "
            f"{self.smoothness:g} |x - x'|, if less, in between, at noise multipliers z and {self.ratio:g} z: each step is the "
            "Gaussian mechanism on one draw"
        )

    @property
    def setting(self) -> Mapping[str, float | str | None]:
        """Name and public numbers."""
        held = {"restart": self.restart, "ratio": self.ratio, "shortest": self.shortest}
        return {"name": "diff2", "clip_norm": self.clip_norm, "smoothness": self.smoothness, **held}

    @property
    def factors(self) -> Factors | None:
        """1 for whole gradients, `ratio` for differences."""
        return None if self.ratio == 1 else self._factor

    def stage(self, step: int) -> Stage:
        """A whole gradient or a difference, by the number of the step."""
        here = self.parameters()
        whole = step % self.restart == 0 or not self.last
        clip_norm = self.clip_norm if whole else self.smoothness * max(self.shortest, self._moved(here))
        whole, clip_norm = whole or clip_norm >= self.clip_norm, min(clip_norm, self.clip_norm)
        return Stage(
            Contribution(FlatClipper(clip_norm)),
            lambda released: self._finish(released, here, whole=whole),
            previous=None if whole else self.last,
        )

    def _factor(self, step: int) -> float:
        return 1.0 if step % self.restart == 0 else self.ratio

    def _moved(self, here: Mapping[str, Tensor]) -> float:
        squares = (
            float((here[n].detach().double() - x.double()).square().sum()) for n, x in self.last.items()
        )
        return math.sqrt(math.fsum(squares))

    def _finish(self, released: Vectors, here: Mapping[str, Tensor], *, whole: bool) -> Vectors:
        old = dict(self.gradient)
        self.gradient.update({n: v.clone() if whole else torch.add(old[n], v) for n, v in released.items()})
        self.last.update({name: value.detach().clone() for name, value in here.items()})
        return {name: value.clone() for name, value in self.gradient.items()}
