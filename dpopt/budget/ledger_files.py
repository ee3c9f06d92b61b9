# SPDX-License-Identifier: Apache-2.0
"""Which ledger a run writes to, and what its earlier runs say about a bound over it."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

from accountants import Event, Ledger, LedgerLocked

FOLDER = Path("privacy-ledgers")


@dataclass(slots=True, weakref_slot=True, eq=False)
class SharedLedger:
    """The one ledger of several runs of one owner: opened with the first of them, closed when the owner says.

    `path` is None until a ledger in the default folder has been created.
    """

    path: Path | None
    held: Ledger | None = None

    def open(self, *, unit: str, relation: str, expected: Event) -> tuple[Path, Ledger]:
        """The ledger and where it lies, opened if it is not.

        Raises:
            LedgerLocked: somebody else has it open.
        """
        if self.held is None:
            try:
                self.path, self.held = opened(self.path, unit=unit, relation=relation, expected=expected)
            except LedgerLocked:
                gc.collect()  # owners that nobody holds any more close theirs
                self.path, self.held = self._again(unit, relation, expected)
            _HELD.add(self)
        assert self.path is not None
        return self.path, self.held

    def close(self) -> None:
        """Close it; what was charged can still be asked. Idempotent."""
        if self.held is not None:
            self.held.close()
            self.held = None
        _HELD.discard(self)

    def _again(self, unit: str, relation: str, expected: Event) -> tuple[Path, Ledger]:
        try:
            return opened(self.path, unit=unit, relation=relation, expected=expected)
        except LedgerLocked as error:
            here = None if self.path is None else self.path.resolve()
            if not any(other.path is not None and other.path.resolve() == here for other in _HELD):
                raise
            raise LedgerLocked(
                f"expected one run at a time on the ledger {self.path}; got another engine of this process that has not "
                "ended; call detach() on that engine first, or go on with it: its make_private may be called again"
            ) from error


_HELD: WeakSet[SharedLedger] = WeakSet()


def default_ledger() -> Path:
    """The first free `privacy-ledgers/run-NNNN.jsonl` below the current directory."""
    number = 1
    while (path := FOLDER / f"run-{number:04d}.jsonl").exists():
        number += 1
    return path


def create_default(*, unit: str, relation: str, expected: Event) -> tuple[Path, Ledger]:
    """Create the first free ledger of the default folder: one for each run, however many start at once."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    while True:
        path = default_ledger()
        try:
            return path, Ledger.open(path, unit=unit, relation=relation, new=True, expected=expected)
        except FileExistsError:
            continue  # another run was faster: take the next number


def open_named(path: Path, *, unit: str, relation: str, expected: Event) -> Ledger:
    """Create or continue the ledger at `path`, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return Ledger.open(path, unit=unit, relation=relation, expected=expected)


def opened(path: Path | None, *, unit: str, relation: str, expected: Event) -> tuple[Path, Ledger]:
    """The ledger at `path`, or a new one in the default folder, and where it lies."""
    if path is None:
        return create_default(unit=unit, relation=relation, expected=expected)
    return path, open_named(path, unit=unit, relation=relation, expected=expected)


def public_seeds(attempts: Sequence[Mapping[str, object]]) -> tuple[object, ...]:
    """The insecure seeds that runs of a ledger began with, each once, in order."""
    seeds = (attempt.get("insecure_seed") for attempt in attempts)
    return (*dict.fromkeys(seed for seed in seeds if seed is not None),)


def insecurity(attempts: Sequence[Mapping[str, object]]) -> tuple[str, ...]:
    """What a bound over a ledger must assume about the seeds of its runs; nothing where all were secret."""
    seeds = public_seeds(attempts)
    if not seeds:
        return ()
    told = ", ".join(map(str, seeds))
    return (f"INSECURE: nobody knows the seed of a run on this ledger that was not secret ({told})",)
