# SPDX-License-Identifier: Apache-2.0
"""Imports point one way: no circle between files or between rooms, no room reads its own face, no layer looks up.

A room is a sub-package; a file directly in a package stands for itself.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("accountants", "clipping", "dpopt")
FEWEST_ROOMS = 5
REGISTERS = re.compile(r"(?m)^(@rule|folds)\(")

# What examples pass through, from the errors that name them to the sum of a step: each room may import those before it.
SENSITIVE = (
    "clipping.errors", "clipping.reruns", "clipping.rounding", "clipping.kernels", "clipping.gradients", "clipping.clippers",
    "clipping.rules", "clipping.modules", "clipping.shared_values", "clipping.contributions", "clipping.collectors", "clipping.recording", "clipping.loss_checks",
    "clipping.validators", "clipping.step", "clipping",
)  # fmt: skip


def sources() -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(source: str, modules: Iterable[str]) -> set[str]:
    """The modules out of `modules` that a source imports, anywhere in it."""
    known, found = set(modules), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A name that is a file's too means the file, unless the face binds it: the wider reading finds more.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known
            if not inner <= known:
                found.add(str(node.module))
    return found & known


def graph() -> dict[str, set[str]]:
    """Module -> the modules it imports."""
    files = sources()
    return {name: imports(path.read_text(), files) - {name} for name, path in files.items()}


def room(module: str) -> str:
    """The room of a module: its sub-package, or the module itself where it stands in a package directly."""
    return ".".join(module.split(".")[:2])


def rooms() -> dict[str, set[str]]:
    """Room -> the rooms it imports."""
    found: dict[str, set[str]] = {}
    for module, others in graph().items():
        own = room(module)
        found.setdefault(own, set()).update({room(other) for other in others} - {own})
    return found


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """One circle, or nothing."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle_between_files():
    assert circle(graph()) == []


def test_no_circle_between_rooms():
    found = rooms()
    assert sum(any(other.startswith(f"{name}.") for other in sources()) for name in found) >= FEWEST_ROOMS
    assert circle(found) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    known = {"dpopt", "dpopt.step", "dpopt.sampling", "dpopt.sampling.users"}
    hidden = "def f():\n    from dpopt.sampling import users, Batch\n    import dpopt.step"
    assert imports(hidden, known) == {"dpopt.step", "dpopt.sampling", "dpopt.sampling.users"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_reads_the_face_of_its_own_package(package):
    # Faces hand names out; whoever stands inside and reads one loads the whole house, in an order nobody chose.
    readers = [
        name for name, others in graph().items() if name.startswith(f"{package}.") and package in others
    ]
    assert readers == []


def test_what_sees_examples_is_built_in_layers():
    edges = {name: others for name, others in rooms().items() if name.partition(".")[0] == "clipping"}
    assert set(edges) <= set(SENSITIVE), "expected each room of clipping among the layers; add the new one"
    for name, others in edges.items():
        above = set(SENSITIVE[SENSITIVE.index(name) :])
        assert not others & above, f"{name} imports {sorted(others & above)}"


def test_every_rule_is_imported_by_its_face():
    # A rule that nobody imports falls back to the generic one, and says nothing.
    folder = ROOT / "clipping" / "rules"
    face = imports((folder / "__init__.py").read_text(), sources())
    holders = {path.stem for path in folder.glob("*.py") if REGISTERS.search(path.read_text())}
    assert len(holders) > FEWEST_ROOMS
    assert sorted(f"clipping.rules.{name}" for name in holders) == sorted(face - {"clipping.rules.registry"})
