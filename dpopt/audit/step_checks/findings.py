# SPDX-License-Identifier: Apache-2.0
"""What a check says: what was expected, what was seen, how sure that is, and how to see it again."""

from __future__ import annotations

from dataclasses import dataclass

HOLDS, CAUTION, FAULT, UNCHECKED = "holds", "caution", "fault", "not checked"

LEVEL = 1e-5
"""The chance that one statistical check of a correct step raises an alarm; there are about thirty of them."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    `verdict` is "holds"; "caution": true to the claim only under a condition that is named; "fault": the claimed guarantee
    does not hold; or "not checked", and why. `figure` is what was measured, over what is allowed (1 is the limit).
    """

    check: str
    verdict: str
    expected: str
    seen: str
    figure: float | None = None
    confidence: str = "exact"
    reproduce: str = ""


@dataclass(frozen=True)
class StepReport:
    """All findings of one step. `exit_code` is 1 for a fault, 3 where nothing could be said, else 0."""

    name: str
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> tuple[Finding, ...]:
        """Where the claimed guarantee does not hold."""
        return tuple(f for f in self.findings if f.verdict == FAULT)

    @property
    def cautions(self) -> tuple[Finding, ...]:
        """Where it holds under a condition."""
        return tuple(f for f in self.findings if f.verdict == CAUTION)

    @property
    def exit_code(self) -> int:
        """0, 1 or 3."""
        if self.faults:
            return 1
        core = {f.check: f.verdict for f in self.findings}
        unseen = [core.get(name) == UNCHECKED for name in ("sensitivity", "noise present")]
        return 3 if any(unseen) else 0

    def __str__(self) -> str:
        """One line for each fault and caution, for the message of a failed test."""
        told = [f"{f.verdict}: {f.check}: expected {f.expected}; got {f.seen}" for f in self.findings]
        odd = [line for line, f in zip(told, self.findings, strict=True) if f.verdict in (FAULT, CAUTION)]
        return "\n".join(odd) or f"{self.name}: no fault found"


def statistical(level: float = LEVEL) -> str:
    """The confidence of a check that errs with probability `level` on a correct step."""
    return f"1 - {level:.0e}"
