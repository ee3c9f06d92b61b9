# SPDX-License-Identifier: Apache-2.0
"""Composing privacy losses on a grid, with every error bounded."""
