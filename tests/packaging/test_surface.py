# SPDX-License-Identifier: Apache-2.0
"""The public surface, frozen: names, their arguments, and the options of the command line.

A change is a diff of `surface.txt` beside this file, made by `python tests/packaging/test_surface.py`.
"""

import inspect
import re
from pathlib import Path

import typer.main

import accountants
import clipping
import dpopt
from dpopt.cli.commands import app

FROZEN = Path(__file__).with_name("surface.txt")


def arguments_of(thing):
    if getattr(thing, "_is_protocol", False):
        return ""
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    shown = []
    for parameter in signature.parameters.values():
        mark = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        shown.append(mark + parameter.name + ("" if parameter.default is parameter.empty else "="))
    return f"({', '.join(shown)})"


def names():
    for package in (accountants, clipping, dpopt):
        for name in sorted(package.__all__):
            thing = getattr(package, name)
            yield f"{package.__name__}.{name}{arguments_of(thing) if callable(thing) else ''}"
            for member in sorted(vars(thing)) if isinstance(thing, type) else ():
                if not member.startswith("_"):
                    value = inspect.getattr_static(thing, member)
                    value = getattr(value, "__func__", value)
                    shown = arguments_of(value) if callable(value) else ""
                    yield f"{package.__name__}.{name}.{member}{shown}"


def options():
    def walk(command, words):
        for parameter in sorted(command.params, key=lambda p: p.name):
            yield " ".join([*words, "/".join([*parameter.opts, *parameter.secondary_opts])])
        for name, inner in sorted(getattr(command, "commands", {}).items()):
            yield from walk(inner, [*words, name])

    yield from walk(typer.main.get_command(app), ["dpopt"])


def surface():
    return "\n".join([*names(), *options()]) + "\n"


def test_the_surface_is_the_frozen_one():
    now, frozen = surface().splitlines(), FROZEN.read_text().splitlines()
    added, gone = sorted(set(now) - set(frozen)), sorted(set(frozen) - set(now))
    assert (added, gone) == ([], []), "if this is meant, run python tests/packaging/test_surface.py"


def test_no_public_signature_takes_any_keyword():
    assert [line for line in FROZEN.read_text().splitlines() if re.search(r"\*\*", line)] == []


if __name__ == "__main__":
    FROZEN.write_text(surface())
