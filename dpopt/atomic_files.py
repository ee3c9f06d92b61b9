# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are written whole or not at all, and synchronised to disk before they take their name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, or leave what was there.

    Raises:
        OSError: it could not be written; `path` is untouched and the remains are removed.
    """
    written_file(path, lambda file: file.write(data))


def written_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file, which takes the name `path` when it has returned, and only then.

    Raises:
        OSError: it could not be written; as with every other error, `path` is untouched and the remains are removed.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _synchronise(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends, and only then.

    Raises:
        OSError: it could not be written, whatever the type of the error in the block; `folder` is as it was and
            the remains are removed.
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        _synchronise_all(partial)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _synchronise(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        if isinstance(error, Exception) and not isinstance(error, OSError):
            # safetensors has a type of its own for a full disk
            raise OSError(f"{type(error).__name__}: {error}") from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def _synchronise_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        _synchronise(path)
    _synchronise(folder)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
