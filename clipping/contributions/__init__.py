# SPDX-License-Identifier: Apache-2.0
"""What one example adds to a clipped sum, and the sum that knows its own sensitivity."""

from clipping.contributions.contribution import Contribution, Count, Measured

__all__ = [
    "Contribution",
    "Count",
    "Measured",
]
