# SPDX-License-Identifier: Apache-2.0
"""The file under a ledger: created whole under its name, locked by one writer, written through to the disk.

Each line is on disk before the next; the first failure stops it for good.
"""

import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# Whatever has the name: opening a pipe does not wait for its other end.
_OPEN = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class LedgerCorrupt(ValueError):
    """A ledger file does not verify; the message gives the line."""


class LedgerLocked(RuntimeError):
    """Another writer holds the ledger."""


class LedgerNotDurable(RuntimeError):
    """A record could not be made durable; the ledger takes no more charges in this process."""


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


def open_locked(path: Path, header: bytes, *, new: bool) -> tuple[int, bool]:
    """Open `path` as its only writer, or create it with `header`: the descriptor, and whether it was created.

    Raises:
        FileExistsError: it exists, and `new` says that it must not.
        LedgerCorrupt: it is no regular file.
        LedgerLocked: somebody else has it open.
        LedgerNotDurable: it could not be created.
    """
    if not new:
        try:
            return _open(path), False
        except FileNotFoundError:
            pass
    try:
        return _create(path, header), True
    except FileExistsError:
        if new:
            raise
        return _open(path), False  # another process was faster


def open_for_reading(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading, without a lock; other things are refused and never waited for.

    Raises:
        LedgerCorrupt: it is no regular file.
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | _OPEN)
    return _regular(fd, path)


def write_durably(fd: int, line: bytes) -> None:
    """Write all of `line` and synchronise it."""
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(fd, rest) :]
    getattr(os, "fdatasync", os.fsync)(fd)


def require_untouched(fd: int, size: int, path: Path) -> None:
    """Refuse a file that somebody else moved, removed, replaced or changed while it was open.

    Raises:
        LedgerNotDurable: what would be written next would be lost, or would break the chain.
    """
    require_in_place(fd, path)
    found = os.fstat(fd).st_size
    if found != size:
        raise _touched(path, f"changed to {found} bytes")


def require_in_place(fd: int, path: Path) -> None:
    """Refuse a file that its name does not lead to any more, whatever other names it has.

    Raises:
        LedgerNotDurable: who looks for the ledger at `path` would not find what is written to it.
    """
    held = os.fstat(fd)
    try:
        named = os.stat(path)
    except OSError as error:
        got = "removed" if held.st_nlink == 0 else "moved away"
        raise _touched(path, f"{got} ({os.strerror(error.errno or 0)})") from error
    if held.st_nlink == 0 or (held.st_dev, held.st_ino) != (named.st_dev, named.st_ino):
        raise _touched(path, "replaced by another file")


def _touched(path: Path, got: str) -> LedgerNotDurable:
    return LedgerNotDurable(
        f"{path} must be left alone during a run; got it {got}; release nothing, put a copy with all its charges "
        "back (or the file itself, if it was moved), and open the ledger again"
    )


def _open(path: Path) -> int:
    fd = _regular(os.open(path, os.O_RDWR | _OPEN), path)
    try:
        _lock(fd, path)
        require_in_place(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _regular(fd: int, path: str | os.PathLike[str]) -> int:
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd
    os.close(fd)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    got = kinds.get(stat.S_IFMT(mode), "something else")
    raise LedgerCorrupt(f"{path} must be a file to be a ledger; got {got}; give the name of a file")


def _create(path: Path, header: bytes) -> int:
    """Create `path` locked and with its header, or not at all: no one ever sees it empty or without its lock."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    linked = False
    try:
        _lock(fd, path)
        write_durably(fd, header)
        linked = _named(partial, path)
        partial.unlink(missing_ok=True)
        _synchronise(path.parent)
    except BaseException as error:
        os.close(fd)
        partial.unlink(missing_ok=True)
        if linked:
            path.unlink(missing_ok=True)
        if isinstance(error, FileExistsError) or not isinstance(error, OSError):
            raise
        raise LedgerNotDurable(
            f"a new ledger must be durable; got {type(error).__name__}: {error} for {path}; choose another disk"
        ) from error
    return fd


def _named(partial: Path, path: Path) -> bool:
    """Give the finished file its name, which must be free."""
    try:
        path.hardlink_to(partial)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A disk without hard links: reserve the name first, so that two creators cannot both have it.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        partial.replace(path)
    return True


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise LedgerLocked(
            f"the ledger must have one writer; got a second one for {path} ({error}); "
            "wait for the other run to end (one of this process: detach() it, or leave its `with` statement), or use "
            "read() to look at it"
        ) from error


def _synchronise(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
