# SPDX-License-Identifier: Apache-2.0
"""What a run can say about the checks of its losses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossReport:
    """Which checks the losses of a run have passed; tells nothing of the data.

    `num_shown` backwards were shown by their graph to be of a mean (or sum) over examples. Of `num_given` more, whose
    losses came one for each example, it was only looked whether something brings examples together. In `num_followed`
    of `num_draws` draws the batch was followed from the loader to the loss.
    """

    num_shown: int
    num_given: int
    num_followed: int
    num_draws: int

    def __str__(self) -> str:
        return (
            f"losses: {self.num_shown} backwards shown by their graph to be of a sum over examples, {self.num_given} of "
            f"losses given one for each example; {self.num_followed} of {self.num_draws} draws followed from the loader "
            "to the loss; not seen: numbers made outside torch, padding, other modules' gradients"
        )
