# SPDX-License-Identifier: Apache-2.0
"""The private records: clean, deterministic, and disjoint from the public text and across the split."""

import ast
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from dpopt import embedded
from dpopt.embedded import private_records
from dpopt.embedded.docstrings import (
    MAX_CHARS,
    Docstring,
    Fingerprints,
    docstrings_of,
    standard_library_folder,
)
from dpopt.embedded.public import public_fingerprints
from dpopt.embedded.records import Records, is_validation, private_docstrings

SMALL = ("networkx",)
SOME = ("numpy", "scipy", "networkx")


@pytest.fixture(scope="module")
def docstrings() -> tuple[Docstring, ...]:
    return private_docstrings(SOME)


@pytest.fixture(scope="module")
def small() -> Records:
    return private_records(packages=SMALL)


def test_there_are_enough_records(docstrings: tuple[Docstring, ...]) -> None:
    assert len(docstrings) >= 3_000


@pytest.mark.slow
def test_there_are_enough_records_by_default() -> None:
    records = private_records()
    assert len(records.train) >= 12_000
    assert len(records.validation) >= 400
    assert not set(records.train) & set(records.validation)


def test_no_record_resembles_the_public_text(docstrings: tuple[Docstring, ...]) -> None:
    public = public_fingerprints()
    assert not any(public.resembles(docstring.text) for docstring in docstrings)


def test_the_public_text_is_the_standard_library() -> None:
    public = public_fingerprints()
    found = list(docstrings_of(standard_library_folder() / "json"))
    assert found
    assert sum(public.resembles(docstring.text) for docstring in found) >= 0.8 * len(found)


def test_no_record_resembles_another(docstrings: tuple[Docstring, ...]) -> None:
    assert len({docstring.text for docstring in docstrings}) == len(docstrings)
    seen = Fingerprints()
    for docstring in docstrings:
        assert not seen.resembles(docstring.text)
        seen.add(docstring.text)


def test_records_are_clean_text(docstrings: tuple[Docstring, ...]) -> None:
    for docstring in docstrings:
        header, blank, body = docstring.record.split("\n", 2)
        assert header == docstring.header
        assert "\n" not in header
        assert blank == ""
        assert body == body.strip()
        assert len(body) <= MAX_CHARS
        assert not any(line != line.rstrip() for line in body.splitlines())


def test_the_split_is_by_module(docstrings: tuple[Docstring, ...]) -> None:
    sides = {(docstring.module, is_validation(docstring.module, seed=0)) for docstring in docstrings}
    assert len(sides) == len({module for module, _ in sides})


def test_train_and_validation_are_disjoint(small: Records) -> None:
    assert small.train
    assert small.validation
    assert not set(small.train) & set(small.validation)
    assert small.unit == "one docstring of one function, method or class"
    assert [package for package, _ in small.sources] == ["networkx"]


def test_records_do_not_depend_on_the_process(small: Records) -> None:
    code = (
        "from dpopt.embedded import private_records as p; from hashlib import sha256; "
        "print(sha256(repr(p(packages=('networkx',))).encode()).hexdigest(), end='')"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout == sha256(repr(small).encode()).hexdigest()


def test_the_seed_moves_the_split_and_not_the_records(small: Records) -> None:
    other = private_records(seed=1, packages=SMALL, max_validation=10_000)
    every = private_records(packages=SMALL, max_validation=10_000)
    assert set(other.validation) != set(every.validation)
    assert {*other.train, *other.validation} == {*every.train, *every.validation}
    assert len(private_records(packages=SMALL, max_train=5, max_validation=3).train) == 5


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(
        ModuleNotFoundError, match=r"got 'no_such_package', which is not installed; pip install"
    ):
        private_records(packages=("no_such_package",))


def test_reading_the_records_imports_the_standard_library_only() -> None:
    for path in Path(embedded.__file__).parent.glob("*.py"):
        if path.name == "pretrain.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.partition(".")[0]
                assert top in sys.stdlib_module_names or name.startswith("dpopt.embedded"), (path.name, name)
