# SPDX-License-Identifier: Apache-2.0
"""The benchmark of canaries in whole runs: a cell is run, kept, taken up again, and told."""

import json

from benchmarks.audit_power import BOUNDS, Cell, collected, summary, table


def test_a_cell_is_run_once_and_told(tmp_path):
    cell = Cell(8.0, 60, 0.5, 4)
    found = collected(cell, 1, tmp_path, only_kept=False)
    assert collected(cell, 2, tmp_path, only_kept=True) == json.loads(json.dumps(found))
    told = summary(cell, found)
    assert told["runs"] == 1 and all(name in told for name in BOUNDS)
    assert len(table([(cell, told)])) == 7
