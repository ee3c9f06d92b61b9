# SPDX-License-Identifier: Apache-2.0
"""Adaptive clipping under Opacus' keywords: `clipping="adaptive"`, which is the estimator `Quantile`.

| keyword | what it becomes |
|---|---|
| `target_unclipped_quantile` | `target`, the fraction of norms to lie below the clip norm |
| `clipbound_learning_rate` | `rate` of the geometric moves |
| `min_clipbound`, `max_clipbound` | `least` and `most` |
| `unclipped_num_std` | the noise of the count, hence its `share` of the budget: noise_multiplier^2 / (2 std)^2 |

As there, the noise of the gradients is (noise_multiplier^-2 - (2 std)^-2)^(-1/2), so both together cost what
`noise_multiplier` says (Andrew et al. 2021, arXiv:1905.03871, theorem 1). Other than there, the fraction is the noisy
count over the *expected* batch size: the drawn one is secret.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from dpopt.estimators.quantile import Quantile
from dpopt.public_numbers import check_real

NAME = "adaptive"


class AdaptiveClipping(NamedTuple):
    """The numbers as given; None takes the default of `Quantile`."""

    target_unclipped_quantile: float | None = None
    clipbound_learning_rate: float | None = None
    max_clipbound: float | None = None
    min_clipbound: float | None = None
    unclipped_num_std: float | None = None

    def require(self, clipping: str) -> None:
        """Raise ValueError for numbers given to another way of clipping, or that are none."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        for name, value in given.items():
            check_real(name, value)
        if given and clipping != NAME:
            raise ValueError(
                f'expected {sorted(given)} with clipping="adaptive" only; got clipping={clipping!r}; leave them out, or '
                'write them into the name, as in clipping="quantile:target=0.6,rate=0.1"'
            )
        if self.unclipped_num_std is not None and not self.unclipped_num_std > 0:
            raise ValueError(
                f"expected unclipped_num_std > 0; got {self.unclipped_num_std}; a twentieth of the batch size is usual"
            )

    def estimator(self, clip_norm: float, noise_multiplier: float) -> Quantile:
        """The estimator, beginning at `clip_norm`, for a run of this noise multiplier.

        Raises:
            ValueError: the count takes the whole budget, or the bounds leave nothing between them.
        """
        numbers = {
            "target": self.target_unclipped_quantile,
            "rate": self.clipbound_learning_rate,
            "most": self.max_clipbound,
            "least": self.min_clipbound,
            "share": self._share(noise_multiplier),
        }
        return Quantile(clip_norm, **{name: value for name, value in numbers.items() if value is not None})

    def _share(self, noise_multiplier: float) -> float | None:
        std = self.unclipped_num_std
        if std is None or noise_multiplier == 0 or math.isinf(std):
            return None
        if noise_multiplier >= 2 * std:
            raise ValueError(
                f"expected noise_multiplier < 2 * unclipped_num_std; got {noise_multiplier:g} and {std:g}: the count alone "
                "would cost as much as the whole step; raise unclipped_num_std"
            )
        return (noise_multiplier / (2 * std)) ** 2
