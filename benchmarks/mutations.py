# SPDX-License-Identifier: Apache-2.0
"""Plants privacy bugs in our own code, one at a time, and tells who notices each: the step checker, or which test.

python -m benchmarks.mutations                                   # all, about half an hour
python -m benchmarks.mutations --only noise --write benchmarks/results/mutations_2026-11-27
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).resolve().parent.parent / "tests" / "mutations"


def row(mutation: Any, caught: Any) -> str:
    checks = ", ".join(caught.checks) or ("-" if mutation.step else "not asked")
    asked = not (caught.checks and not caught.tests and mutation.tests)
    tests = ", ".join(f"`{name.removeprefix('tests/')}`" for name in caught.tests) or (
        "-" if asked else "not run"
    )
    return f"| {mutation.name} | {mutation.kind} | {checks} | {tests} | {'yes' if caught.any else '**no**'} |"


def report(rows: list[tuple[Any, Any]]) -> str:
    """The page."""
    missed = [m.name for m, caught in rows if not caught.any]
    by_checker = sum(bool(caught.checks) for _, caught in rows)
    asked = sum(bool(m.step) for m, _ in rows)
    by_tests = sum(bool(caught.tests) for _, caught in rows)
    lines = [row(m, caught) for m, caught in rows]
    return "\n".join(
        [
            "# Planted privacy bugs, and who noticed them",
            "",
            f"{len(rows)} bugs, planted one at a time in our own code: {len(rows) - len(missed)} noticed, {len(missed)} missed. "
            f"The step checker was asked about {asked} and noticed {by_checker}; tests of the suite noticed {by_tests}. Made by "
            "`python -m benchmarks.mutations`; the catalogue is `tests/mutations`.",
            "",
            "The first test that failed is named; others may fail as well. \"Not asked\": the bug is outside what a single "
            "training step shows (prices, ledgers, budgets), or in a part that the checker's small steps do not reach.",
            "",
            "| planted bug | kind | step checker | first test that fails | noticed |",
            "|---|---|---|---|---|",
            *lines,
            "",
            f"Missed: {', '.join(missed) or 'none'}.",
            "",
        ]
    )  # fmt: skip


def main(words: list[str] | None = None) -> None:
    """Plant, judge, print, and write if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[""], help="words of the name, or kinds")
    parser.add_argument("--no-tests", action="store_true", help="ask the step checker alone")
    parser.add_argument("--first", action="store_true", help="run no tests where the step checker notices")
    parser.add_argument("--join", type=Path, nargs="*", default=[], help="take these .json for results")
    parser.add_argument("--write", type=Path, help="the name of the .md and .json, without its ending")
    options = parser.parse_args(words)
    sys.path.insert(0, str(CATALOGUE))
    from judging import Caught, judged
    from planted_bugs import MUTATIONS

    rows = [row for path in options.join for row in known(path, {m.name: m for m in MUTATIONS}, Caught)]
    for mutation in [] if options.join else MUTATIONS:
        if any(word in mutation.name or word == mutation.kind for word in options.only):
            caught = judged(mutation, tests=not options.no_tests, first=options.first)
            rows.append((mutation, caught))
            told = f"{', '.join(caught.checks) or '-'} | {', '.join(caught.tests) or '-'} | {caught.trouble}"
            print(
                f"{'' if caught.any else 'MISSED '}{mutation.name} | {told} | {caught.seconds:.0f} s",
                flush=True,
            )
            if options.write is not None:
                write(options.write, rows)
    if options.write is not None:
        write(options.write, rows)


def known(path: Path, mutations: dict[str, Any], kind: Any) -> list[tuple[Any, Any]]:
    """The results of an earlier run."""
    data = json.loads(path.read_text())
    made = ("checks", "tests", "trouble", "seconds")
    return [
        (mutations[x["name"]], kind(**{name: x[name] for name in made}))
        for x in data
        if x["name"] in mutations
    ]


def write(name: Path, rows: list[tuple[Any, Any]]) -> None:
    """The page, and the results as data."""
    name.with_name(f"{name.name}.md").write_text(report(rows))
    data = [{"name": m.name, "kind": m.kind, **asdict(caught)} for m, caught in rows]
    name.with_name(f"{name.name}.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
