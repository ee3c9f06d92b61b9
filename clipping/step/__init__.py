# SPDX-License-Identifier: Apache-2.0
"""The sensitive side of a step: which drawn examples have come, and their clipped sum."""
