# SPDX-License-Identifier: Apache-2.0
"""The report of the device benchmark: verdicts first, then one table a setting."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.gpu.correctness import Verdict
from benchmarks.gpu.steps import Measured
from benchmarks.report import described, table
from benchmarks.variants import FLOOR

GIB = 1 << 30


@dataclass
class Findings:
    """All that a run found."""

    device: str
    command: str
    surroundings: dict[str, object]
    verdicts: list[Verdict]
    roofline: dict[str, float]
    cells: dict[str, Measured] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def cell_table(title: str, measured: Measured) -> str:
    """One setting: milliseconds, ratio to the non-private step, memory, synchronisations."""
    floor = measured.figures.get(FLOOR)
    rows = []
    for name, figure in measured.figures.items():
        ratio = f"{figure.seconds / floor.seconds:.2f}" if floor else "-"
        memory = f"{figure.peak / GIB:.2f} GiB" if figure.peak else "-"
        if floor and floor.peak and figure.peak:
            memory += f" (x{figure.peak / floor.peak:.2f})"
        syncs = str(figure.syncs) if figure.syncs >= 0 else "-"
        rows.append((name, f"{1e3 * figure.seconds:.2f}", ratio, memory, syncs, str(figure.steps)))
    head = ("variant", "ms a step", "of non-private", "peak memory", "host syncs a step", "steps timed")
    failed = "".join(f"\n- {name} did not run: {why}" for name, why in measured.failures.items())
    drift = f"\n\nThe non-private step at the end took {measured.drift:.3f} of its time at the start."
    return f"## {title}\n\n{table(head, rows)}{drift}{chr(10) + failed if failed else ''}"


def markdown(found: Findings) -> str:
    """The whole report."""
    wrong = [verdict for verdict in found.verdicts if not verdict.right]
    checks = table(
        ("check", "largest relative error", "verdict"),
        [(v.name, f"{v.error:.1e}", "right" if v.right else "WRONG") for v in found.verdicts],
    )
    roof = ", ".join(
        f"{name} {value / 1e12:.2f} T{'B' if name == 'bytes' else 'FLOP'}/s"
        for name, value in found.roofline.items()
    )
    parts = [
        f"# Steps on {found.device}",
        f"`{found.command}`",
        described(found.surroundings),
        f"Device at most, measured in this run: {roof}." if roof else "",
        f"## Right or wrong\n\n{len(found.verdicts) - len(wrong)} of {len(found.verdicts)} right.\n\n{checks}",
        *(cell_table(title, measured) for title, measured in found.cells.items()),
        "Not reached in the time: " + "; ".join(found.left_out) + "." if found.left_out else "",
    ]
    return "\n\n".join(part for part in parts if part)
