# SPDX-License-Identifier: Apache-2.0
"""One forward of a module, run again as it ran: its draws, its attributes, and one example of it alone."""
