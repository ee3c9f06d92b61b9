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

from clipping.clippers import FlatClipper
from clipping.grads import row_norm


class HiddenState:
    """The vector e of e <- e + sum_i r_i - clip(e, clip_norm), which adds clip(e, clip_norm) to each step's sum.

    Guarantees
    ----------
    What `give` adds has norm at most `clip_norm` whatever the state, so between any two states it differs by at most
    2 clip_norm (test_guarantee_hidden_feedback_stays_within_its_clip_norm).
    """

    def __init__(self, clip_norm: float) -> None:
        self.clip_norm = clip_norm
        self._clipper = FlatClipper(clip_norm)
        self._state: dict[str, Tensor] = {}

    def give(self, total: Mapping[str, Tensor], cut: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`total` plus the clipped state; takes what this step's clipping `cut` off into the state."""
        weight = self._weight()
        if weight == 0.0:  # nothing yet, or overflown: then it holds no direction any more
            self._state = {}
        found = {
            name: value if name not in self._state else value + weight * self._state[name]
            for name, value in total.items()
        }
        for name in {*self._state, *cut}:
            kept = self._state[name] * (1 - weight) if name in self._state else torch.zeros_like(total[name])
            self._state[name] = kept if name not in cut else kept + cut[name]
        return found

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
        parts = [row_norm(value.unsqueeze(0)).double().cpu() for value in self._state.values()]
        norm = torch.linalg.vector_norm(torch.cat(parts))
        return float(self._clipper.weights(norm.view(1))[0] * (1 - 1e-5))
