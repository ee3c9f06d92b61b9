# SPDX-License-Identifier: Apache-2.0
"""A user's own `accountants.py` or `clipping.py` beside the script is named, not stumbled over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpopt.guards.own_packages import NAMES, require_own

ROOT = Path(__file__).parents[3]


def run(folder, *options):
    script = folder / "script.py"
    script.write_text("import dpopt.guards.own_packages\nprint('imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", *options, str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ["{}.py", "{}/__init__.py"])
def test_a_file_that_hides_a_package_is_named_with_the_way_out(tmp_path, name, shape):
    mine = tmp_path / shape.format(name)
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine = True\n")
    done = run(tmp_path)
    assert done.returncode != 0 and "ImportError: expected dpopt's own package" in done.stderr
    hiding = mine.parent if mine.name == "__init__.py" else mine
    assert str(hiding) in done.stderr and f"rename {hiding.name!r}" in done.stderr


def test_both_remedies_help_and_a_folder_without_code_hides_nothing(tmp_path):
    (tmp_path / "clipping.py").write_text("mine = True\n")
    assert "imported" in run(tmp_path, "-P").stdout
    (tmp_path / "clipping.py").rename(tmp_path / "my_clipping.py")
    (tmp_path / "accountants").mkdir()
    assert "imported" in run(tmp_path).stdout


def test_what_was_imported_before_is_looked_at_too(monkeypatch, tmp_path):
    require_own()
    with pytest.raises(ImportError, match="expected dpopt's own package 'accountants'"):
        require_own(beside=tmp_path)
    monkeypatch.setitem(
        sys.modules, "clipping", type(sys)("clipping")
    )  # made by hand: nothing known, nothing said
    require_own(["clipping"], tmp_path)
