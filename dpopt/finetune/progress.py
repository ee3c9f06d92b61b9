# SPDX-License-Identifier: Apache-2.0
"""Who is told how a run goes. Everything told is public."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dpopt.finetune.run_plan import RunPlan


@dataclass(frozen=True, slots=True)
class StepSeen:
    """What may be shown after a step: its number, an upper bound on epsilon so far, a loss on public data if new."""

    step: int
    epsilon: float
    loss: float | None
    seconds: float


class Listener(Protocol):
    """Who is told how a run goes; everything told is public."""

    def stage(self, text: str) -> None:
        """Something that takes a while begins."""
        ...

    def planned(self, plan: RunPlan) -> None:
        """All inputs have passed; training is about to begin."""
        ...

    def stepped(self, seen: StepSeen) -> None:
        """A step was made; step 0 is the model before the first."""
        ...


class Silence:
    """A listener that keeps still."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def planned(self, plan: RunPlan) -> None:
        """Nothing."""

    def stepped(self, seen: StepSeen) -> None:
        """Nothing."""
