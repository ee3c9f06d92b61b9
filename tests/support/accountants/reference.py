# SPDX-License-Identifier: Apache-2.0
"""Reference epsilons of the Poisson-subsampled Gaussian, add or remove one, and where they come from.

`tight`: two connect-the-dots grids (privacy-loss distributions rounded pessimistically, two exponential tilts,
both directions of add and remove) extrapolated to mesh 0; closed form where q = 1 or T = 1. A second
implementation agrees to 2e-5 absolute. Opacus 1.6.0 with its default orders; prv_accountant 0.2.0 with
eps_error 0.01 and delta_error delta/1000 (its upper end as kept by Opacus' copy).
"""

import math
from typing import NamedTuple

from accountants import Gaussian, PoissonSampled, Repeated


class Row(NamedTuple):
    sigma: float
    q: float
    steps: int
    delta: float
    tight: float
    opacus_rdp: float
    opacus_prv: float  # nan: raises, out of memory or infinite

    @property
    def event(self) -> Repeated:
        return Repeated(PoissonSampled(self.q, Gaussian(self.sigma)), self.steps)


nan = math.nan
ROWS = (
    Row(1, 0.01, 1000, 1e-5, 1.82824, 2.1014, 1.8384),
    Row(0.5, 0.001, 10_000, 1e-6, 6.34611, 7.5697, 6.3566),
    Row(0.5, 0.1, 100, 1e-5, 31.3710, 35.225, 31.383),
    Row(0.5, 1e-5, 100_000, 1e-9, 2.1474, 3.9732, 2.1597),
    Row(0.8, 0.01, 10_000, 1e-5, 10.0536, 10.935, 10.064),
    Row(1, 1e-5, 1, 1e-9, 0.000438903, 0.74419, 0.01),
    Row(1, 1e-5, 100_000, 1e-7, 0.0156211, 0.57401, 0.0262),
    Row(1, 1, 1, 1e-5, 4.377178, 4.7285, 4.3874),
    Row(2, 0.1, 1000, 1e-5, 8.27929, 8.9438, 8.2897),
    Row(2, 0.5, 1000, 1e-5, 67.1684, 70.904, 67.18),
    Row(4, 0.1, 10_000, 1e-5, 13.4984, 14.451, 13.509),
    Row(4, 0.99, 100, 1e-6, 14.2816, 15.152, 14.292),
    Row(10, 0.1, 100_000, 1e-5, 17.9173, 19.121, 17.928),
    Row(10, 1e-5, 100_000, 1e-9, 0.00132646, 0.25142, 0.0102),
    Row(0.3, 0.01, 1000, 1e-5, 69.8157, 79.055, 69.829),
    Row(0.1, 0.001, 100, 1e-5, 156.864, 226.48, 156.88),
    Row(1, 0.01, 1_000_000, 1e-6, 145.497, 150.92, nan),
    Row(20, 0.01, 1_000_000, 1e-6, 2.25586, 2.421, 2.266),
    Row(1, 0.01, 1000, 1e-14, 4.54370, 4.9759, nan),
    Row(0.5, 1, 1000, 1e-5, 2268.768, 2311.8, nan),
)
"""Rows 1 to 20, cited by number in the tests."""

DIGITS = 5e-6
"""Relative: half a unit of the last digit printed above, at worst."""
