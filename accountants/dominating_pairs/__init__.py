# SPDX-License-Identifier: Apache-2.0
"""The worst pair of output laws of each mechanism, one step at a time."""
