# SPDX-License-Identifier: Apache-2.0
"""Estimators: how a step makes a gradient out of what its examples contribute.

    public state -> Stage: what each example adds        (clipping.Contribution, SENSITIVE from here)
                 -> one clipped sum of named vectors     -> one joint Gaussian, charged     THE BOUNDARY
                 -> Stage.finish: the gradient, and the next public state                   (post-processing)

The law of this file: a stage is made from public state alone, and `finish` sees what was released and nothing else. The
one exception is `fold`, for hidden state: it stands before the noise, and its estimator pays for it by an event of
its own.

To add an estimator: write one file, and one line in `dpopt.estimators.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

from accountants import Event
from dpopt.estimators.stage import Stage
from dpopt.mechanisms.group_gaussian import Allocation
from dpopt.sampling.sampler import Sampling

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Factors = Callable[[int], float]
"""Number of a step -> what the noise multiplier is multiplied by in that step: public, and fixed in advance."""


class Estimator(Protocol):
    """How released vectors become a gradient."""

    @property
    def guarantee(self) -> str:
        """What one step costs and why, in a sentence for people."""
        ...

    @property
    def setting(self) -> Mapping[str, float | str | None]:
        """Name and public numbers, for the ledger: a run that continues another must have the same."""
        ...

    @property
    def allocation(self) -> Allocation | None:
        """How the released vectors share the budget of a step; None: as the mechanism says."""
        ...

    @property
    def factors(self) -> Factors | None:
        """How the noise multiplier varies from step to step; None: not."""
        ...

    @property
    def speaks_of_zero(self) -> bool:
        """Whether an example without a gradient adds something: then zeroing a record is worth replacing it."""
        ...

    def fresh(self) -> Estimator:
        """The same numbers, and the state of a run that begins: a run takes one of its own."""
        ...

    def event(self, sampling: Sampling, released: Event) -> Event:
        """What one charge of `sampling` costs, where the release by itself is `released`."""
        ...

    def stage(self, step: int) -> Stage:
        """The step number `step` of a run, from public state. Changes nothing."""
        ...


def sampled(self: object, sampling: Sampling, released: Event) -> Event:
    """The event of an estimator whose release is one mechanism on one draw: that of the sampler."""
    return sampling.event(released)


Numbers = TypeVar("Numbers", bound="DataclassInstance")


def renewed(self: Numbers) -> Numbers:
    """A copy of a dataclass with the same numbers; state, which `init=False` fields hold, begins anew."""
    return replace(self)
