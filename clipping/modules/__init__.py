# SPDX-License-Identifier: Apache-2.0
"""The modules of a model: which are recorded, and how those without a rule are proven apart and run again."""
