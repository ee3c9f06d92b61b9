# SPDX-License-Identifier: Apache-2.0
"""Everything that a machine with a CUDA device must tell us, in one command of at most eight minutes."""
