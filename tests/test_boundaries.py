# SPDX-License-Identifier: Apache-2.0
"""accountants knows no tensors, clipping knows no accountants, and only dpopt knows both."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"accountants": {"torch", "clipping", "dpopt"}, "clipping": {"accountants", "dpopt"}}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_fresh_interpreter_loads_no_more_than_allowed(package):
    code = f"import sys, {package}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert package in loaded
    assert not loaded & FORBIDDEN[package]


def imported(source):
    """Top-level packages that a source imports anywhere, also inside functions and type-checking blocks."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "expected absolute imports"
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (a.value.partition(".")[0] for a in node.args if isinstance(a, ast.Constant))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_source_imports_what_is_forbidden(package):
    sources = sorted((ROOT / package).rglob("*.py"))
    assert sources
    for path in sources:
        assert not set(imported(path.read_text())) & FORBIDDEN[package], path


def test_the_check_sees_imports_wherever_they_hide():
    hidden = "def f():\n    import torch.nn as nn\n    from dpopt.step import x\n    importlib.import_module('clipping.tape')"
    assert set(imported(hidden)) == {"torch", "dpopt", "clipping"}


FACTORIES = {
    *("arange", "empty", "eye", "full", "linspace", "normal", "ones", "rand", "randint", "randn", "randperm"),
    *("tensor", "zeros"),
}


def without_a_device(source):
    """Lines that make a tensor on whatever device is the user's default, which need not be that of the others."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            made = ast.unparse(node.func.value) == "torch" and node.func.attr in FACTORIES
            if made and not any(keyword.arg == "device" for keyword in node.keywords):
                yield node.lineno


@pytest.mark.parametrize("package", ["clipping", "dpopt"])
def test_no_tensor_is_made_on_the_default_device(package):
    found = {
        str(path): lines
        for path in (ROOT / package).rglob("*.py")
        if (lines := list(without_a_device(path.read_text())))
    }
    assert not found
    assert list(without_a_device("a = torch.zeros(2)\nb = torch.zeros(2, device='cpu')")) == [1]
