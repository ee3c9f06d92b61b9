# SPDX-License-Identifier: Apache-2.0
"""Measurements of dpopt: steps against peers, utility against peers, and the embedded default."""
