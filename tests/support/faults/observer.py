# SPDX-License-Identifier: Apache-2.0
"""Judges a ledger by what the processes said they drew. Reads the file by its own code, not the library's."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from accountants import accountant, charged, read

NOISES = 4
"""Draws of noise in one release: the parameters of the model."""


@dataclass
class Verdict:
    """What one fault did. `under` and `over` are charges fewer or more than releases, of this fault alone."""

    kind: str
    point: str
    struck: bool = False
    releases: int = 0
    charges: int = 0
    under: int = 0
    over: int = 0
    repeats: int = 0
    halves: int = 0
    wrong: list[str] = field(default_factory=list)


def chain(data: bytes) -> tuple[int, str]:
    """The charges in whole lines, and what is wrong with the chain (nothing: "")."""
    previous, charges = "0" * 64, 0
    for number, line in enumerate(data.split(b"\n")[:-1]):
        record = json.loads(line)
        told = {name: record[name] for name in ("seq", "kind", "payload", "prev")}
        digest = hashlib.sha256(json.dumps(told, separators=(",", ":")).encode()).hexdigest()
        if (record["seq"], record["prev"], record["hash"]) != (number, previous, digest):
            return charges, f"line {number + 1} breaks the chain"
        previous, charges = record["hash"], charges + (record["kind"] == "charge")
    return charges, ""


def _harmless(data: bytes) -> bool:
    """Whether the unfinished last line is known to be none of a charge."""
    return any(f'"kind":"{kind}"'.encode() in data[data.rfind(b"\n") :] for kind in ("attempt", "note"))


@dataclass
class Observer:
    """Follows one ledger over all runs on it."""

    path: Path
    drawn: int = 0
    charges: int = 0
    faults: int = 0
    excess: int = 0
    epsilon: float = 0.0
    noises: Counter = field(default_factory=Counter)
    batches: Counter = field(default_factory=Counter)

    def judge(self, verdict: Verdict, told: list[tuple[str, object]], *, repaired: bool = True) -> None:
        """Count what the processes told since the last time, and compare with the file.

        `repaired`: the file is as a run left it, not as the harness tore it.
        """
        seen = Counter(name for name, _ in told)
        noises = [str(value) for name, value in told if name == "noise"]
        batches = [str(value) for name, value in told if name == "batch"]
        verdict.repeats += self._repeated(self.noises, noises) + self._repeated(self.batches, batches)
        verdict.struck = verdict.struck or bool(seen["struck"])
        verdict.halves += seen["half"]
        for name in ("error", "forked use", "not finite"):
            verdict.wrong += [f"{name}: {value}" for told_name, value in told if told_name == name]
        # A release whose noise broke off in the middle is one release.
        starts = sum(value == 0 for name, value in told if name == "place")
        self.drawn += starts
        verdict.releases += starts
        if repaired and self.path.exists():
            self._compare(verdict)

    def _compare(self, verdict: Verdict) -> None:
        data = self.path.read_bytes()
        charges, broken = chain(data)
        verdict.wrong += [broken] if broken else []
        # An unfinished charge is counted by the next run, but belongs to this fault.
        excess = charges - self.drawn + (data[-1:] != b"\n" and not _harmless(data))
        self.faults += verdict.struck
        if excess > self.faults:
            verdict.wrong.append(f"{excess} charges too many after {self.faults} faults")
        verdict.charges += charges - self.charges
        # A charge lost must show even where earlier faults left charges too many.
        verdict.under += max(0, self.drawn - charges, self.excess - excess)
        verdict.over += max(0, excess - self.excess)
        epsilon = accountant("rdp").curve(charged(read(self.path).records)).epsilon(1e-6)
        if epsilon < self.epsilon:
            verdict.wrong.append(f"epsilon fell from {self.epsilon} to {epsilon}")
        self.charges, self.epsilon, self.excess = charges, epsilon, excess

    @staticmethod
    def _repeated(known: Counter, new: list[str]) -> int:
        known.update(new)
        return sum(known[value] > 1 for value in new)
