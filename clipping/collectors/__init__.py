# SPDX-License-Identifier: Apache-2.0
"""Collectors: from what one backward delivers to clipped sums."""
