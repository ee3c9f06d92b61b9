# SPDX-License-Identifier: Apache-2.0
"""What is priced in the accounting benchmark: noise multiplier, sampling rate, steps and delta of each setting."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from benchmarks.pricing import Run


class Setting(NamedTuple):
    """`steps` steps at noise multiplier `sigma` and Poisson rate `q`, priced at `delta`."""

    sigma: float
    q: float
    steps: int
    delta: float

    @property
    def runs(self) -> tuple[Run, ...]:
        """The steps as one run."""
        return (Run(self.sigma, self.q, self.steps),)


# fmt: off
_KNOWN = (
    (1, 0.01, 1000, 1e-5), (0.5, 0.001, 10_000, 1e-6), (0.5, 0.1, 100, 1e-5), (0.5, 1e-5, 100_000, 1e-9),
    (0.8, 0.01, 10_000, 1e-5), (1, 1e-5, 1, 1e-9), (1, 1e-5, 100_000, 1e-7), (1, 1, 1, 1e-5),
    (2, 0.1, 1000, 1e-5), (2, 0.5, 1000, 1e-5), (4, 0.1, 10_000, 1e-5), (4, 0.99, 100, 1e-6),
    (10, 0.1, 100_000, 1e-5), (10, 1e-5, 100_000, 1e-9), (0.3, 0.01, 1000, 1e-5), (0.1, 0.001, 100, 1e-5),
    (1, 0.01, 1_000_000, 1e-6), (20, 0.01, 1_000_000, 1e-6), (1, 0.01, 1000, 1e-14), (0.5, 1, 1000, 1e-5),
)
"""The table of known values in tests/support/accountants/reference.py, in its order."""
_CORNERS = (
    (0.3, 1, 1, 1e-5), (0.5, 1e-5, 1, 1e-12), (1, 1, 1, 1e-12), (5, 0.01, 1, 1e-8), (10, 1, 1000, 1e-12),
    (50, 1, 100_000, 1e-8), (0.3, 0.99, 100, 1e-12), (50, 1e-5, 100_000, 1e-12),
)
"""One step, full batches, the ends of the ranges."""
_SPREAD = (
    (0.3, 1e-5, 100, 1e-5), (0.3, 1e-5, 100_000, 1e-5), (0.3, 0.0001, 10_000, 1e-8),
    (0.3, 0.001, 10_000, 1e-8), (0.3, 0.001, 100_000, 1e-12), (0.3, 0.5, 10, 1e-5),
    (0.5, 1e-5, 10_000, 1e-5), (0.5, 1e-5, 100_000, 1e-5), (0.5, 0.0001, 1000, 1e-5),
    (0.5, 0.001, 100_000, 1e-12), (0.5, 0.1, 100, 1e-8), (0.5, 0.1, 1000, 1e-5), (0.5, 0.5, 100, 1e-5),
    (0.7, 1e-5, 1000, 1e-5), (0.7, 0.0001, 1000, 1e-5), (0.7, 0.0001, 100_000, 1e-12),
    (0.7, 0.001, 100_000, 1e-5), (0.7, 0.01, 10_000, 1e-8), (0.7, 0.01, 100_000, 1e-12),
    (1, 1e-5, 100, 1e-12), (1, 1e-5, 100_000, 1e-8), (1, 0.01, 1000, 1e-8), (1, 0.1, 10, 1e-12),
    (1, 0.1, 1000, 1e-5), (1, 0.1, 10_000, 1e-5), (1, 0.5, 1000, 1e-8), (2, 0.0001, 100, 1e-8),
    (2, 0.0001, 1000, 1e-12), (2, 0.001, 1000, 1e-12), (2, 0.01, 10_000, 1e-5), (2, 0.5, 100, 1e-12),
    (2, 0.5, 1000, 1e-12), (5, 1e-5, 100_000, 1e-8), (5, 0.0001, 10_000, 1e-8), (5, 0.01, 100, 1e-8),
    (5, 0.1, 10, 1e-8), (5, 0.5, 10, 1e-8), (10, 0.0001, 10_000, 1e-12), (10, 0.001, 10, 1e-12),
    (10, 0.001, 100_000, 1e-8), (10, 0.01, 100, 1e-5), (10, 0.1, 100, 1e-8), (10, 0.5, 1000, 1e-8),
    (20, 0.001, 1000, 1e-5), (20, 0.001, 10_000, 1e-12), (20, 0.01, 10_000, 1e-12), (20, 0.1, 10, 1e-8),
    (20, 0.1, 10_000, 1e-12), (20, 0.5, 10, 1e-5), (50, 0.001, 100_000, 1e-12), (50, 0.01, 10, 1e-5),
    (50, 0.01, 100, 1e-5), (50, 0.1, 10, 1e-8), (50, 0.5, 10, 1e-12), (50, 0.5, 100, 1e-12),
)
"""Five settings for each half of a decade of epsilon from 0.001 to 300, values of all parameters in turn."""
# fmt: on
SETTINGS: tuple[Setting, ...] = tuple(Setting(*row) for row in _KNOWN + _CORNERS + _SPREAD)


def wandering(levels: int, repeats: int, rate: float = 0.01) -> tuple[Run, ...]:
    """A random walk of the noise multiplier between 0.6 and 2: `levels` distinct values, `repeats` steps each."""
    x = np.cumsum(np.random.default_rng(0).normal(0, 0.05, levels))
    share = (x - x.min()) / (x.max() - x.min())
    return tuple(Run(float(sigma), rate, repeats) for sigma in 0.6 * (2 / 0.6) ** share)
