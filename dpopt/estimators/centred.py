# SPDX-License-Identifier: Apache-2.0
"""Centred estimators: clip what differs from a public guess of the gradient, and move the guess.

    S_t = sum_i clip(g_i - m_t, tau) + noise,    m_{t+1} = m_t + rate * S_t / (expected batch size),    step along m_{t+1}

m is made of releases alone. The view as stochastic proximal steps, m_{t+1} = argmin_m D(m - g) + |m - m_t|^2 / (2 tau):

| D | clip | m follows | what it is |
|---|---|---|---|
| l2 norm | to the ball of radius tau | the geometric median | clipped momentum; not tracked (m_t = 0): plain clipping |
| l1 norm | each coordinate to +- tau | the median of each coordinate | as tau -> 0: the sign of momentum |
| Huber | the ball, and damped inside | between median and mean | tau -> infinity: momentum with 1 - rate |

Where gradients differ more from each other than from m, or the noise of m is larger than the gradients, a centre
is of no use; it does not remove the bias of clipping at a stationary point (m -> 0 there).

References: Karimireddy, He, Jaggi (2021), arXiv:2012.10333 (clipped momentum); Schaipp et al. (2024),
arXiv:2402.12828 (proximal view); Weiszfeld (1937).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipping import ClipRule, Contribution, FlatClipper, SampleGrads
from clipping.gradients.clamped import Clamped
from clipping.gradients.shifted import shifted
from dpopt.estimators.estimator import Factors, renewed, sampled
from dpopt.estimators.stage import Stage, Vectors
from dpopt.mechanisms.group_gaussian import Allocation


@dataclass(frozen=True, slots=True)
class Centred:
    """Clips by `rule(clip_norm)` around a tracked centre that moves by `rate` times each release.

    `coordinates`, their number, bounds each coordinate by clip_norm / sqrt(coordinates) instead, so that
    `clip_norm` is the sensitivity still. With `rounds` over 1 each batch is kept, summed and released so often, the
    centre moved in between: Weiszfeld's iteration for the geometric median of a batch, where the rule normalises.
    Not `tracked`, each step begins at 0.

    Guarantees
    ----------
    Each release is the Gaussian mechanism on a draw: the centre is a function of earlier releases, and around any
    public centre one example's clipped difference has norm at most `clip_norm`; replaced, twice that
    (test_guarantee_a_public_centre_costs_nothing). Rounds: `dpopt.release.release`.
    """

    clip_norm: float
    rule: ClipRule = FlatClipper
    rate: float = 1.0
    rounds: int = 1
    tracked: bool = True
    coordinates: int | None = None
    name: str = "centred"
    centre: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)
    allocation: Allocation | None = field(default=None, init=False, repr=False)
    factors: Factors | None = field(default=None, init=False, repr=False)
    fresh = renewed
    event = sampled

    def __post_init__(self) -> None:
        self.rule(self.clip_norm)
        if not (0 < self.rate <= 1 and self.rounds >= 1):
            raise ValueError(
                f"expected 0 < rate <= 1 and rounds >= 1; got {self.rate} and {self.rounds}; a rate of 1 moves the centre "
                "by the whole release, and rounds are paid for with noise"
            )
        if self.coordinates is not None and self.coordinates < 1:
            raise ValueError(
                f"expected coordinates >= 1 or None; got {self.coordinates}; give the number of trainable coordinates"
            )

    @property
    def guarantee(self) -> str:
        """What one step costs."""
        return (
            f"differences from a centre made of earlier releases, clipped to {self.clip_norm:g}: each step is the "
            f"Gaussian mechanism on one draw{'' if self.rounds == 1 else f', its noise shared by {self.rounds} rounds'}"
        )

    @property
    def setting(self) -> Mapping[str, float | str | None]:
        """Name and public numbers."""
        rule = repr(self.rule(self.clip_norm))
        held = {"rate": self.rate, "rounds": self.rounds, "tracked": float(self.tracked)}
        return {"name": self.name, "rule": rule, "coordinates": self.coordinates, **held}

    @property
    def speaks_of_zero(self) -> bool:
        """An example without a gradient is clipped from the centre like any other."""
        return self.tracked or self.rounds > 1

    def stage(self, step: int) -> Stage:
        """One around the centre as it is."""
        here = dict(self.centre) if self.tracked else {}

        def again(released: Vectors) -> Contribution:
            nonlocal here
            here = moved_by(here, released, self.rate)
            return self._contribution(here)

        def finish(released: Vectors) -> Vectors:
            self.centre.update(moved_by(here, released, self.rate))
            return {
                name: value.clone() for name, value in self.centre.items()
            }  # users change gradients in place

        return Stage(self._contribution(here), finish, self.rounds, again if self.rounds > 1 else None)

    def _contribution(self, centre: Vectors) -> Contribution:
        bound = None if self.coordinates is None else self.clip_norm / math.sqrt(self.coordinates)

        def moved(name: str, grads: SampleGrads, scale: float) -> SampleGrads:
            found = shifted(grads, centre[name] / scale) if centre else grads
            return found if bound is None else Clamped(found, bound / scale)

        return Contribution(self.rule(self.clip_norm), moved=moved)


def moved_by(centre: Vectors, released: Vectors, rate: float) -> dict[str, Tensor]:
    """The centre after a release; nothing is written into the tensors given."""
    if not centre:
        return {name: value * rate for name, value in released.items()}
    return {name: torch.add(centre[name], value, alpha=rate) for name, value in released.items()}
