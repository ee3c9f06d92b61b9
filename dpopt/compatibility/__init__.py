# SPDX-License-Identifier: Apache-2.0
"""What scripts written for Opacus bring and expect, and what of it is refused."""
