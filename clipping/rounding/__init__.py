# SPDX-License-Identifier: Apache-2.0
"""Products and norms whose rounding error is proven, and counted where it could hide a gradient."""
