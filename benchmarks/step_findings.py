# SPDX-License-Identifier: Apache-2.0
"""The step checker on training steps of other libraries and on our own: what it finds, and how to see it again.

python -m benchmarks.step_findings                                    # those that are installed
python -m benchmarks.step_findings --write benchmarks/results/step-findings_2026-11-27
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.other_steps import STEPS
from dpopt.audit.step_checks import CAUTION, FAULT, UNCHECKED, StepReport, check_step

OWN = Path(__file__).resolve().parent.parent / "tests" / "mutations"
OURS = ("explicit", "two passes", "per layer", "group noise", "tied", "secure", "familiar")


def table(report: StepReport) -> list[str]:
    """The findings that are not "holds", a row each."""
    lines = ["| finding | verdict | expected | seen | confidence | again |", "|---|---|---|---|---|---|"]
    for f in report.findings:
        if f.verdict in (FAULT, CAUTION):
            again = f"`{f.reproduce}`" if f.reproduce else ""
            cells = (f.check, f"**{f.verdict}**", f.expected, f.seen, f.confidence, again)
            lines.append("| " + " | ".join(x.replace("|", "/") for x in cells) + " |")
    return lines if len(lines) > 2 else ["No fault, no caution."]


def section(title: str, command: str, report: StepReport, seconds: float) -> str:
    """One step."""
    held = [f.check for f in report.findings if f.verdict not in (FAULT, CAUTION, UNCHECKED)]
    unseen = [f"{f.check} ({f.seen})" for f in report.findings if f.verdict == UNCHECKED]
    moved = next((f"{f.figure:.4f}" for f in report.findings if f.check == "sensitivity" and f.figure), "-")
    return "\n".join(
        [
            f"## {title}",
            "",
            f"`{command}`: exit code {report.exit_code}, {seconds:.0f} s. Largest movement of one record over the allowed "
            f"one: {moved}.",
            "",
            *table(report),
            "",
            f"Holds: {', '.join(held)}." + (f" Not checked: {'; '.join(unseen)}." if unseen else ""),
            "",
        ]
    )  # fmt: skip


def summary(reports: dict[str, StepReport]) -> list[str]:
    """One row for each step."""
    lines = ["| step | faults | cautions |", "|---|---|---|"]
    for title, report in reports.items():
        faults, cautions = ([f.check for f in found] for found in (report.faults, report.cautions))
        lines.append(f"| {title} | {', '.join(faults) or '-'} | {', '.join(cautions) or '-'} |")
    return lines


NOTES = """
How to read it. A *fault* breaks the claim of the accountant. A *caution* holds under a condition that is named: noise that
repeats when a script is started again from the same seed (a fault where the seed is known, or two runs see different
records), a scale that shows the number of records. "Hostile records" is a record of infinities or NaNs which makes the
whole release so: a fault where a record can hold them. Steps without a row are correct as far as a search can tell.
"""


def main(words: list[str] | None = None) -> None:
    """Check, print, and write if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(STEPS)}; default: all, and our own")
    parser.add_argument("--write", type=Path, help="the name of the .md and .json, without its ending")
    options = parser.parse_args(words)
    reports: dict[str, StepReport] = {}
    sections = []

    def check(title: str, command: str, make) -> None:
        start = time.process_time()
        reports[title] = check_step(make(), name=title)
        sections.append(section(title, command, reports[title], time.process_time() - start))
        print(sections[-1], flush=True)

    for name in options.names or STEPS:
        if importlib.util.find_spec(name.split("_")[0]) is None:
            print(f"{name}: not installed", file=sys.stderr)
            continue
        title, make = STEPS[name]
        check(title, f"dpopt audit step benchmarks.other_steps:{name}", make)
    if not options.names:
        sys.path.insert(0, str(OWN))
        import own_steps

        for name in OURS:
            check(f"dpopt, {name}", f"own_steps.STEPS[{name!r}] of tests/mutations", own_steps.STEPS[name])
    if options.write is not None:
        page = ["# What the step checker finds", "", *summary(reports), NOTES, *sections]
        options.write.with_name(f"{options.write.name}.md").write_text("\n".join(page))
        data = {title: [asdict(f) for f in report.findings] for title, report in reports.items()}
        options.write.with_name(f"{options.write.name}.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
