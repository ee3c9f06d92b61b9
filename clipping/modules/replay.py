# SPDX-License-Identifier: Apache-2.0
"""Which forward calls a backward may still deliver from: those made since the last draw, each for one clipping.

A backward sees rows, not examples. What can be known is kept here: examples of an earlier draw, and examples
that were clipped once already (a retained graph, a backward for each output), are not clipped into the sum again.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Origin:
    """One forward of the whole model (or one call of a layer outside of it), in the turn in which it ran."""

    turn: object


class Turns:
    """The origins of this turn, and the unit that each was clipped in; a unit is clipped once, by its norm."""

    def __init__(self) -> None:
        self.turn: object = object()
        """The one that runs: origins of another are of other examples."""
        self.delivering: tuple[Origin, object | None] | None = None
        """The origin and the unit for which it was asked last: what holds for one layer of them holds for the next."""
        self._units: WeakKeyDictionary[Origin, object] = WeakKeyDictionary()

    def renew(self) -> None:
        """Begin a turn: forward calls made before are of other examples."""
        self.turn = object()
        self.forgive()

    def forgive(self) -> None:
        """Forget what was clipped: the sum it went to was dropped."""
        self._units.clear()
        self.delivering = None

    def require(self, origin: Origin, unit: object | None) -> None:
        """Raise RuntimeError where `origin` cannot deliver to `unit`; None stands for one that adds nothing."""
        if origin.turn is not self.turn:
            raise RuntimeError(
                "expected losses of the batch drawn last; got a backward through a forward that ran before that batch "
                "was drawn, whose examples this step does not account for, or before a public step, which moved the "
                "weights; run the model after it, and detach what is carried over from earlier batches"
            )
        if unit is not None and self._units.setdefault(origin, unit) is not unit:
            raise RuntimeError(
                "expected one backward through each forward of the model; got a second one, which would clip the same "
                "examples twice; add the losses first, or send them back inside same_examples(), or run the "
                "forward again after discard()"
            )
        self.delivering = origin, unit
