# SPDX-License-Identifier: Apache-2.0
"""Every test that a docstring quotes as the check of its guarantee exists under that name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUOTED = re.compile(r"\btest_\w+")
DEFINED = re.compile(r"def (test_\w+)\(")


def names(folder, pattern):
    return {
        name for path in sorted((ROOT / folder).rglob("*.py")) for name in pattern.findall(path.read_text())
    }


@pytest.mark.parametrize("package", ["accountants", "clipping", "dpopt"])
def test_quoted_tests_exist(package):
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    quoted = names(package, QUOTED) - files
    assert len(quoted) > 3
    assert sorted(quoted - names("tests", DEFINED)) == []
