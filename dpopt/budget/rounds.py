# SPDX-License-Identifier: Apache-2.0
"""Rounds: which draws one charge pays for, which of them are paid, and which may still be released."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Draw(NamedTuple):
    """The indices of one batch, and its number among the draws of the run."""

    indices: list[int]
    number: int


@dataclass(slots=True)
class Rounds:
    """The draws of one run, cut into rounds of `length` draws, each of which one charge pays for.

    Payment goes by the round that was *drawn*: a draw that was never released leaves the numbers of those behind it
    as they are, so no charge can reach into the next round.

    Guarantees
    ----------
    No draw is released twice, and none before its round is paid for, once
    (test_guarantee_a_round_is_paid_for_once_and_before_its_first_release,
    test_guarantee_no_draw_is_released_twice).
    """

    length: int
    drawn: int = 0
    over: int = 0
    """Draws below this number are past: released, failed or passed over."""
    charged: int = 0
    _paid: int = -1
    _size: int = 0

    def next(self, num_records: int) -> int:
        """The number of a new draw out of `num_records`, the same for a whole round: a partition is one of them."""
        if self.place(self.drawn)[1] and num_records != self._size:
            raise RuntimeError(
                "expected one dataset for the whole round; got one of another length, whose records may have been in an "
                "earlier batch of it; draw the rest of the round, or begin a new run"
            )
        self._size = num_records
        self.drawn += 1
        return self.drawn - 1

    def place(self, draw: int) -> tuple[int, int]:
        """The round of a draw, and its place there."""
        return divmod(draw, self.length)

    def number(self, draw: int | None) -> int:
        """The number of the charge that pays for `draw`; None: of the next charge."""
        return self.charged - (draw is not None and self.is_paid(draw))

    def is_paid(self, draw: int) -> bool:
        """Whether the round of this draw has been charged."""
        return self.place(draw)[0] == self._paid

    def pay(self, draw: int) -> None:
        """The round of this draw has been charged."""
        self._paid = self.place(draw)[0]
        self.charged += 1

    def close(self, draw: int) -> None:
        """Draw `draw` is about to be released, and never again."""
        self.require_open(draw)
        self.over = draw + 1

    def require_open(self, draw: int) -> None:
        """Raise RuntimeError for a draw that is past."""
        if not self.over <= draw < self.drawn:
            raise RuntimeError(
                "expected a batch drawn since the last release; got one that is past, whose price covers one release; "
                "draw the next one"
            )

    def steps(self, charges: int) -> int:
        """Releases that `charges` more charges afford from here on, the rest of a paid round included."""
        done = self.over % self.length
        rest = self.length - done if self.is_paid(self.over) else 0
        return rest + max(0, charges * self.length - (0 if rest else done))
