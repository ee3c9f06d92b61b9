# SPDX-License-Identifier: Apache-2.0
"""A file that one process appends lines to, each on disk before the next; the first failure stops it for good."""

import os
from pathlib import Path
from typing import BinaryIO

from accountants.storage import (
    LedgerLocked,
    LedgerNotDurable,
    require_in_place,
    require_untouched,
    write_durably,
)


class AppendedFile:
    """The open and locked file `fd` at `path`; `end` is where the next line goes, set by whoever has read it.

    Guarantees:
        - when `append` returns, the line is on disk, in the file that `path` leads to.
        - after a failure, of which nobody knows what reached the disk, nothing is appended any more.
    """

    __slots__ = ("_end", "_failed", "_fd", "_path", "_pid", "_place", "_size")

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path, self._pid = fd, path, os.getpid()
        self._place = Path(os.path.abspath(path))  # the working directory may change
        self._size = self._end = 0
        self._failed = ""

    def reader(self) -> BinaryIO:
        """Return a view of the file from its start; closing it leaves the file open."""
        os.lseek(self._fd, 0, os.SEEK_SET)
        return os.fdopen(self._fd, "rb", closefd=False)

    def continue_at(self, end: int, size: int) -> None:
        """Append from `end` on, over what is left of an unfinished line up to `size`."""
        os.lseek(self._fd, end, os.SEEK_SET)
        self._end, self._size = end, size

    def append(self, line: bytes) -> None:
        """Write `line` durably, and take no other before `confirm`.

        Raises:
            LedgerNotDurable: it may or may not have reached the disk.
        """
        # Stands if this thread is interrupted anywhere below: what reached the disk is then unknown here.
        self._failed = "an interruption"
        try:
            write_durably(self._fd, line)
            require_in_place(self._fd, self._place)
        except LedgerNotDurable as error:
            self._failed = str(error)
            raise
        except OSError as error:
            self._failed = f"{type(error).__name__}: {error}"
            raise LedgerNotDurable(
                f"the ledger must be durable before a release; got {self._failed} writing {self._path}; release "
                "nothing, free the disk or repair it, and open the ledger again"
            ) from error
        self._end += len(line)
        self._size = max(self._size, self._end)

    def confirm(self) -> None:
        """Say that the line is counted in memory too, and go on."""
        self._failed = ""

    def cut_off(self) -> None:
        """Remove what follows the last line."""
        try:
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
            self._size = self._end
        except OSError as error:
            raise LedgerNotDurable(
                f"a repair must be durable; got {type(error).__name__}: {error} for {self._path}; repair the disk"
            ) from error

    def require_untouched(self) -> None:
        """Refuse to go on where somebody else moved, removed, replaced or changed the file."""
        require_untouched(self._fd, self._size, self._place)

    def require_own(self) -> None:
        """Refuse a process that did not open it. It takes no lock that a fork may have copied."""
        if self._pid != os.getpid():
            raise LedgerLocked(
                f"the ledger must be written by the process that opened it, {self._pid}; got {os.getpid()}; "
                "charge in the parent, or open a ledger of its own in the child"
            )

    def require_usable(self) -> None:
        """Refuse to go on after `close`, or after a failure."""
        if self._fd < 0:
            raise ValueError(f"the ledger must be open; got {self._path} after close(); open it again")
        if self._failed:
            raise LedgerNotDurable(
                f"the ledger must be durable before a release; got an earlier failure ({self._failed}) on "
                f"{self._path}; close it, repair the disk, and open it again"
            )

    def close(self) -> None:
        """Release the lock and the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
