# SPDX-License-Identifier: Apache-2.0
"""Plain DP-SGD as an estimator: the clipped sum itself, and no state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from clipping import Clipper, Contribution
from dpopt.estimators.estimator import Estimator, Factors, renewed, sampled
from dpopt.estimators.stage import Stage
from dpopt.mechanisms.group_gaussian import Allocation


def only_estimator(clipper: Clipper | None, estimator: Estimator | None) -> Estimator:
    """The one that was given: an estimator, or plain clipping with a clipper."""
    if (clipper is None) == (estimator is None):
        raise TypeError(
            "expected a clipper or an estimator; got "
            f"{'neither' if clipper is None else 'both'}; pass clipper=FlatClipper(1.0), or estimator="
        )
    return Plain(Contribution(clipper)) if estimator is None else estimator  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True)
class Plain:
    """The clipped sum itself: DP-SGD with any clipper, and no state.

    Guarantees
    ----------
    One step is the Gaussian mechanism of the mechanism's event, on a draw of the sampler
    (test_guarantee_release_is_the_charged_mechanism).
    """

    contribution: Contribution
    allocation: Allocation | None = field(default=None, init=False, repr=False)
    factors: Factors | None = field(default=None, init=False, repr=False)
    speaks_of_zero: bool = field(default=False, init=False, repr=False)
    fresh = renewed
    event = sampled

    @property
    def guarantee(self) -> str:
        """What one step costs."""
        return "each step is the Gaussian mechanism on the clipped sum of one draw"

    @property
    def setting(self) -> Mapping[str, float | str | None]:
        """Name and public numbers."""
        return {"name": "plain"}

    def stage(self, step: int) -> Stage:
        """The same for every step."""
        return Stage(self.contribution, lambda released: released, direct=True)
