# SPDX-License-Identifier: Apache-2.0
"""What must hold while a run is open: its hooks, the order of steps, one process, what may not change."""
