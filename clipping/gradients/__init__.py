# SPDX-License-Identifier: Apache-2.0
"""Per-example gradients of one parameter, each kept in the structure in which its layer made it."""
