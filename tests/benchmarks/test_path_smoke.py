# SPDX-License-Identifier: Apache-2.0
"""The path of a step is counted, and grows no longer."""

import subprocess
import sys
from pathlib import Path

from benchmarks import path

ROOT = Path(__file__).parents[2]

MOST = {"dpopt, a size seen before": (54, 227), "dpopt": (60, 255), "dpopt, a followed step": (69, 580)}
"""Files and moves. Lower these with every shortening, so that none is lost."""


def counted(*options):
    """What a process of its own prints: in this one other tests' objects are cleaned up in the middle of the step."""
    command = [sys.executable, "-m", "benchmarks.path", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_the_path_of_a_step_is_no_longer_than_it_was(tmp_path):
    file = tmp_path / "path.json"
    out = counted("--write", file, "--files")
    assert "| dpopt |" in out and "clipping/step/step_sum.py" in out
    rows = [line.split("|")[1:5] for line in counted("--against", file).splitlines()]
    found = {name.strip(): tuple(map(int, counts)) for name, *counts in rows[2:]}
    for name, (most_files, most_moves) in MOST.items():
        assert found[name][1:] == found[f"{name}, before"][1:]  # counts, not times
        assert found[name][1] <= most_files and found[name][2] <= most_moves


def test_a_move_is_a_call_in_another_file():
    walk = path.Walk({"one": ["a", "a", "b", "a"], "two": ["a", "c"]})
    assert (walk.files(), walk.moves()) == (3, 4)
    assert (walk.files("two"), walk.moves("two")) == (2, 2)
