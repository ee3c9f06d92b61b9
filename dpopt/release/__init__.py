# SPDX-License-Identifier: Apache-2.0
"""THE BOUNDARY: clipped sums come in, noisy gradients go out, and only those are written."""
