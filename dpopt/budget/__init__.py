# SPDX-License-Identifier: Apache-2.0
"""What a run pays: prices, payments, the account on its ledger, and what it declares there."""

from accountants.calibrate import least_noise
from dpopt.budget.budget import Budget, affordable, exhausted

__all__ = [
    "Budget",
    "affordable",
    "exhausted",
    "least_noise",
]
