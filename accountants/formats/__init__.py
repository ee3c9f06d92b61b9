# SPDX-License-Identifier: Apache-2.0
"""Events written down for others: as JSON in a ledger, and as `dp_accounting` states them."""
