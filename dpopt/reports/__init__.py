# SPDX-License-Identifier: Apache-2.0
"""What a run cost, for people: a report in words and pictures."""
