# SPDX-License-Identifier: Apache-2.0
"""Adaptive clipping: a clip norm that follows the norms of the gradients, as told by noisy counts that are paid for.

| | the count | its price |
|---|---|---|
| `Quantile` | examples below the clip norm, as +- 1/2 | a share of each step's budget |
| `Slack` | examples in each of a few ranges below the clip norm | nothing: short gradients leave room in the ball |

The clip norm of a step is a function of earlier releases, and the noise multiplier is fixed: the ordinary composition
holds. The divisor is the expected batch size, never the drawn one.

References: Andrew et al. (2021), arXiv:1905.03871, algorithm 1 (quantile; centred counts: McMahan et al. 2018,
arXiv:1812.06210, section 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

COUNT = "count:below"

_LEAST = 1e-8


@dataclass(slots=True)
class Level:
    """Public state: the clip norm of the next step, and the fractions that the last release told."""

    clip_norm: float
    fractions: tuple[float, ...] = ()


def followed(
    clip_norm: float, fraction: float, target: float, rate: float, most: float, least: float = _LEAST
) -> float:
    """The clip norm after a step in which about `fraction` of the norms lay below: towards `target`."""
    factor = math.exp(-rate * (min(1.0, max(0.0, fraction)) - target))
    return min(most, max(clip_norm * factor, least))


def check_tracking(target: float, rate: float, most: float) -> None:
    """Refuse a target outside (0, 1), and a rate or a largest clip norm that is not positive."""
    if not (0 < target < 1 and 0 < rate < math.inf and most > 0):
        raise ValueError(
            f"expected 0 < target < 1, a finite rate > 0 and most > 0; got {target}, {rate} and {most}; 0.5 follows the "
            "median, and 0.05 is a usual rate"
        )
