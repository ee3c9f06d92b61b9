# SPDX-License-Identifier: Apache-2.0
"""What a run pays: prices, payments, the account on its ledger, and what it declares there."""

from dpopt.budget.budget import Budget, affordable, exhausted, least_noise

__all__ = [
    "Budget",
    "affordable",
    "exhausted",
    "least_noise",
]
