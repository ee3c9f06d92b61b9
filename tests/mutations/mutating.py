# SPDX-License-Identifier: Apache-2.0
"""Plants a bug: a piece of the text of one of our functions replaced by another, while a block runs.

The text must be there exactly once, so that a bug whose place was rewritten is missed loudly. The code object is
swapped, so that it reaches whoever imported the function by name.
"""

import __future__

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType


@dataclass(frozen=True)
class Edit:
    """In the function at `place` ("module:Class.function"), `old` becomes `new`."""

    place: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """One planted bug, and who is to notice it.

    `step` names one of `own_steps.STEPS` and `checks` those findings of the step checker of which one must be a fault or
    a caution; `tests` are pytest ids of which one must fail. Either may be empty. `quick` ones run in every run of the suite.
    """

    name: str
    kind: str
    edits: tuple[Edit, ...]
    step: str = ""
    checks: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    quick: bool = False


def function_at(place: str) -> FunctionType:
    module, _, path = place.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = inspect.getattr_static(found, name)
    while not isinstance(found, FunctionType):
        found = (
            found.fget
            if isinstance(found, property)
            else getattr(found, "__wrapped__", None) or found.__func__
        )
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    return found


def rewritten(function: FunctionType, changes: list[tuple[str, str]]) -> CodeType:
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        if source.count(old) != 1:
            raise LookupError(
                f"expected {old!r} once in {function.__qualname__}; got it {source.count(old)} times"
            )
        source = source.replace(old, new)
    tree = ast.parse(source)
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    if free := function.__code__.co_freevars:
        lines = "\n".join(f"    {name} = None" for name in free)
        outer = ast.parse(f"def outer():\n{lines}\n    return None").body[0]
        assert isinstance(outer, ast.FunctionDef)
        outer.body[-1:] = [definition, *ast.parse(f"return_ = {definition.name}").body]
        tree.body = [outer]
    flags = function.__code__.co_flags & functools.reduce(
        lambda total, name: total | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
    )
    code = compile(
        ast.fix_missing_locations(tree), inspect.getfile(function), "exec", flags, dont_inherit=True
    )
    found = next(c for c in _nested(code) if c.co_name == definition.name)
    assert found.co_freevars == function.__code__.co_freevars, "the new text sees other names"
    return found


def _nested(code):
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield constant
            yield from _nested(constant)


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The bug is there inside the block, and gone afterwards."""
    changes: dict[str, list[tuple[str, str]]] = {}
    for edit in mutation.edits:
        changes.setdefault(edit.place, []).append((edit.old, edit.new))
    codes = [(function_at(place), rewritten(function_at(place), pairs)) for place, pairs in changes.items()]
    before = [(function, function.__code__) for function, _ in codes]
    try:
        for function, code in codes:
            function.__code__ = code
        yield
    finally:
        for function, code in before:
            function.__code__ = code
