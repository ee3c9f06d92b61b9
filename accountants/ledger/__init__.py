# SPDX-License-Identifier: Apache-2.0
"""What was charged, on disk: an append-only file of hash-linked records, never priced lower than it was."""

from accountants.ledger.ledger import Ledger

__all__ = [
    "Ledger",
]
