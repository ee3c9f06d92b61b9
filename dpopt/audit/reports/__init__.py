# SPDX-License-Identifier: Apache-2.0
"""From the folders of runs to a verdict in one sentence."""
