# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the bounds draws runs whose bounds come out in their order."""

import numpy as np

from benchmarks.audit_bounds import Steps, of_steps, spread


def test_sampled_runs_are_drawn_and_bounded():
    row = of_steps(np.random.default_rng(0), Steps(8.0, 0.5, 10), 300, 3)
    assert row[:2] == ["0.5, 10", "300"] and len(row) == 8
    medians = [float(cell.split()[0]) for cell in row[2:]]
    assert medians[0] > 5.0 and medians[-1] < 3.0


def test_spread():
    assert spread([0.0, 1.0, 2.0]) == "1.00 [0.10, 1.90]"
