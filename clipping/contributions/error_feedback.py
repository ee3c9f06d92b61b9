# SPDX-License-Identifier: Apache-2.0
"""Hidden error feedback: what clipping cut off, summed over the examples of all steps, and given back in clipped pieces.

SENSITIVE: this state holds unclipped gradients and stands before the noise. It never leaves the process.

Reference: Zhang et al. (2024), arXiv:2311.14632, algorithm 1 (DiceSGD), here in sums: thresholds and state are those of
the paper times the expected batch size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from clipping.clippers.whole_gradient import FlatClipper
from clipping.rounding.norms import row_norm


class HiddenState:
    """The vector e of e <- e + sum_i r_i - clip(e, clip_norm), which adds clip(e, clip_norm) to each step's sum.

    `give` makes a step's sum, `keep` takes the step over once it is released.

    Guarantees
    ----------
    What `give` adds has norm at most `clip_norm` whatever the state, so between any two states it differs by at most
    2 clip_norm (test_guarantee_hidden_feedback_stays_within_its_clip_norm).
    """

    def __init__(self, clip_norm: float) -> None:
        self.clip_norm = clip_norm
        self._clipper = FlatClipper(clip_norm)
        self._state: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] | None = None

    def give(self, total: Mapping[str, Tensor], cut: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`total` plus the clipped state; what this step's clipping `cut` off is in the state to keep."""
        weight = self._weight()
        # Nothing yet, or overflown: then it holds no direction any more.
        state = self._state if weight > 0.0 else {}
        found = {
            name: value if name not in state else value + (weight * state[name]).to(value.dtype)
            for name, value in total.items()
        }
        # In float64: what rounding does to the state of a neighbour stays, and adds up over the steps.
        kept = {name: value * (1 - weight) for name, value in state.items()}
        new = {name: value.double() for name, value in cut.items()}
        self._next = {
            **kept,
            **{name: value if name not in kept else value + kept[name] for name, value in new.items()},
        }
        return found

    def keep(self) -> None:
        """The step is released: go on from it."""
        if self._next is not None:
            self._state, self._next = self._next, None

    def __repr__(self) -> str:
        return f"HiddenState({self.clip_norm}, <hidden>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "expected hidden feedback to stay in the run that made it; got a copy or a pickle of it, which holds "
            "unclipped gradients; save the model's weights"
        )

    def _weight(self) -> float:
        if not self._state:
            return 0.0
        parts = [row_norm(value.unsqueeze(0)).cpu() for value in self._state.values()]
        norm = torch.linalg.vector_norm(torch.cat(parts))
        return float(self._clipper.weights(norm.view(1))[0] * (1 - 1e-5))
