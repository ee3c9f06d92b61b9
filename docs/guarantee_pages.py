# SPDX-License-Identifier: Apache-2.0
"""A page for each guarantee, made when the site is built: its words, and the code of the test that holds it.

The words are those of the docstrings' *Guarantees* sections, so the site cannot promise anything else than the code.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("accountants", "clipping", "dpopt")
TEST = re.compile(r"test_\w+")
SECTION = re.compile(
    r"^Guarantees(?: \([^)]*\))?:?[ \t]*\n?(?:-+\n)?(?P<text>.*?)(?=^[A-Z][\w ]*(?:\n-+\n|:\n)|\Z)",
    re.M | re.S,
)


class Guarantee(NamedTuple):
    """What `owner` in `path` promises, and the names of the tests that hold it."""

    path: str
    owner: str
    text: str
    tests: tuple[str, ...]

    @property
    def page(self) -> str:
        """Where its page lies."""
        slug = f"{self.path.removesuffix('.py').replace('/', '-')}-{self.owner}"
        return f"guarantees/{slug.lower().replace('.', '-')}.md"


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            name = f"{prefix}{child.name}"
            yield name, ast.get_docstring(child) or ""
            yield from _definitions(child, f"{name}.")


def guarantees() -> list[Guarantee]:
    """Every Guarantees section of the three packages, in the order of their files."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for owner, docstring in _definitions(ast.parse(path.read_text())):
                if section := SECTION.search(docstring):
                    text = textwrap.dedent(section["text"]).strip()
                    tests = tuple(dict.fromkeys(TEST.findall(text)))
                    found.append(Guarantee(str(path.relative_to(ROOT)), owner, text, tests))
    return found


def test_sources() -> dict[str, tuple[str, str]]:
    """The file and the source of every test, by name."""
    sources = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                sources[node.name] = (str(path.relative_to(ROOT)), ast.get_source_segment(text, node) or "")
    return sources


def page(guarantee: Guarantee, sources: dict[str, tuple[str, str]]) -> str:
    """The text of one page."""
    parts = [
        f"# {guarantee.owner}",
        f"`{guarantee.path}`",
        "## What is promised",
        guarantee.text,
        "## What holds it",
    ]
    for name in guarantee.tests:
        if name in sources:
            path, source = sources[name]
            parts += [f"### {name}", f"`{path}`", f"```python\n{source}\n```"]
    if not guarantee.tests:
        parts.append("The classes of tests for every member of its kind; no test of its own is quoted.")
    return "\n\n".join(parts) + "\n"


def gist(text: str) -> str:
    """The first sentence or point of a guarantee, without the names of its tests."""
    first = re.split(r"\n- |\n\n|\. (?=[A-Z])", text.removeprefix("- "), maxsplit=1)[0]
    first = re.sub(r"\(test_[^)]*\)?|test_\w+,? ?", "", " ".join(first.split()))
    return f"{first.strip().rstrip('.;:')}."


def index(found: list[Guarantee]) -> str:
    """The list of all guarantees."""
    lines = [
        "# Guarantees",
        "Everything that the code promises about privacy, in its own words, each with the tests that are named after it. "
        "The pages are made from the docstrings whenever this site is built.",
    ]
    for package in PACKAGES:
        mine = [g for g in found if g.path.startswith(f"{package}/")]
        rows = [f"- [{g.owner}]({Path(g.page).name}): {gist(g.text)}" for g in mine]
        lines += [f"## {package}", "\n".join(rows)]
    return "\n\n".join(lines) + "\n"


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Called by mkdocs: add the pages."""
    found, sources = guarantees(), test_sources()
    files.append(File.generated(config, "guarantees/index.md", content=index(found)))
    for guarantee in found:
        files.append(File.generated(config, guarantee.page, content=page(guarantee, sources)))
    return files
