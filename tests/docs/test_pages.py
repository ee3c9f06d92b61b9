# SPDX-License-Identifier: Apache-2.0
"""The documentation: its code runs, its claims have artefacts, and the site builds without a warning."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CODE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
ROW = re.compile(r"^\| (?P<claim>[^|]+) \| `(?P<artefact>[^`|]+)` \| (?P<state>\w+) \|$", re.M)
STATES = {"measured", "tested", "open", "withdrawn"}


def name_of(page):
    return str(page.relative_to(ROOT / "docs"))


@pytest.mark.parametrize("page", [page for page in PAGES if CODE.search(page.read_text())], ids=name_of)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in CODE.findall(page.read_text()):
        exec(compile(block, page.name, "exec"), names)


def test_every_claim_has_an_artefact_and_a_state():
    text = (ROOT / "docs" / "claims.md").read_text()
    rows = ROW.findall(text)
    assert len(rows) == text.count("\n| ") - 1  # a row that is written otherwise would be passed over
    for claim, artefact, state in rows:
        assert (ROOT / artefact).exists(), claim
        assert state in STATES, claim
        assert state != "tested" or artefact.startswith("tests/"), claim


def test_every_guarantee_gets_a_page_with_its_tests():
    spec = importlib.util.spec_from_file_location("guarantee_pages", ROOT / "docs" / "guarantee_pages.py")
    assert spec is not None
    assert spec.loader is not None
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    found = pages.guarantees()
    sources = pages.test_sources()
    quoted = sum(
        path.read_text().count("\n" + " " * indent + "Guarantees")
        for package in pages.PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for indent in (4, 8)
    )
    assert len(found) == quoted
    assert len({guarantee.page for guarantee in found}) == len(found)
    for guarantee in found:
        assert all(name in sources for name in guarantee.tests)
        assert guarantee.text in pages.page(guarantee, sources)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    html = "".join(path.read_text() for path in tmp_path.rglob("*.html"))
    assert "PrivateTraining" in html
    assert "fonts.googleapis" not in html  # it opens without a network
