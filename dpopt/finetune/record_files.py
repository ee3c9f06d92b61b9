# SPDX-License-Identifier: Apache-2.0
"""Records from files: JSON Lines, CSV or text, checked to the last line before anything else happens.

The law of this file: one record is one unit of privacy, so no record is split, joined, skipped or repeated; what
cannot be read is refused with its file, its line and a remedy.
"""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".jsonl", ".csv", ".txt")


class InputError(ValueError):
    """Something given by the user cannot be used; nothing was written and nothing was charged."""


class TextRecord(NamedTuple):
    """One record: a prompt that is not learnt, often empty, and the text that is."""

    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Template:
    """How the fields of a row become text: `{name}` stands for the field of that name, `{{` for a brace."""

    pattern: str

    def __post_init__(self) -> None:
        try:
            parts = list(string.Formatter().parse(self.pattern))
        except ValueError as error:
            raise InputError(
                f"expected a template such as '{{title}}: {{body}}'; got {self.pattern!r} ({error}); write {{{{ "
                "for a brace"
            ) from error
        for _, name, spec, conversion in parts:
            if name is not None and (not name or spec or conversion or not name.replace("_", "a").isalnum()):
                raise InputError(
                    f"expected plain field names in braces; got {self.pattern!r}; write '{{title}}: {{body}}', "
                    "without formats, dots or brackets"
                )

    @property
    def fields(self) -> tuple[str, ...]:
        """The names it asks for."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.pattern) if name is not None)

    def fill(self, row: Mapping[str, object], where: str) -> str:
        """The text for one row."""
        return self.pattern.format(**{name: _value(row, name, where) for name in self.fields})


@dataclass(frozen=True, slots=True)
class RecordFormat:
    """How rows become records: a template for the learnt text, and perhaps one for an unlearnt prompt."""

    text: Template = Template("{text}")
    prompt: Template | None = None

    def record(self, row: Mapping[str, object], where: str) -> TextRecord:
        """One row as a record."""
        prompt = "" if self.prompt is None else self.prompt.fill(row, where)
        return TextRecord(prompt, self.text.fill(row, where))


def read_records(paths: Sequence[Path], form: RecordFormat | None = None) -> list[TextRecord]:
    """Read the records of all `paths`, in order. `form` says which fields count (default: the field "text").

    Raises:
        InputError: a file is missing, named twice or of an unknown kind, a line is bad, or a record is empty.
    """
    refuse_repeated(paths)
    return [record for path in paths for record in _read_file(path, form)]


def refuse_repeated(paths: Sequence[Path]) -> None:
    """Refuse a file that is named twice: its records would count twice, and each is one unit of privacy."""
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise InputError(f"expected each file once; got {path} twice; name it once")
        seen.add(path.resolve())


def refuse_overlap(train: Iterable[TextRecord], validation: Iterable[TextRecord]) -> None:
    """Refuse validation records that stand in the training data too: their loss tells about private records."""
    known = set(train)
    shared = sum(record in known for record in validation)
    if shared:
        raise InputError(
            f"expected validation records that are not in the training data; got {shared} that are; remove them "
            "from one of the two"
        )


def _read_file(path: Path, form: RecordFormat | None) -> list[TextRecord]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"expected a file ending in {', '.join(SUFFIXES)}; got {path}; convert it to one record per line "
            "(.jsonl: one JSON object per line)"
        )
    if suffix == ".txt" and form is not None:
        raise InputError(
            f"expected no fields for a .txt file, whose lines are its records; got some for {path}; leave out the "
            "field and template options, or use .jsonl"
        )
    lines = _lines(path)
    form = form or RecordFormat()
    match suffix:
        case ".jsonl":
            numbered = _from_jsonl(path, lines, form)
        case ".csv":
            numbered = _from_csv(path, lines, form)
        case _:
            numbered = ((number, TextRecord("", line)) for number, line in enumerate(lines, start=1))
    return _whole(path, list(numbered))


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"expected a file at {path}; got none; check the path") from error
    except OSError as error:
        raise InputError(f"expected a readable file at {path}; got {error.strerror}; check it") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"expected UTF-8 in {path}; got the byte 0x{data[error.start]:02x} in line {line}; convert the file, "
            "e.g. with iconv -t utf-8"
        ) from error
    # Only line feeds end a line: U+2028 and the like may stand inside a record.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def _from_jsonl(path: Path, lines: list[str], form: RecordFormat) -> Iterator[tuple[int, TextRecord]]:
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            yield number, TextRecord("", "")
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            # The text of the error quotes no content, unlike repr(line): a log may leave the machine.
            told = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise InputError(
                f"expected one JSON object per line; got {told} in {where}; correct the line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"expected a JSON object in {where}; got a {type(row).__name__}; write "
                '{"text": "..."} on each line'
            )
        yield number, form.record(row, where)


def _from_csv(path: Path, lines: list[str], form: RecordFormat) -> Iterator[tuple[int, TextRecord]]:
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    started = 1
    try:
        header = next(reader, [])
        if not header or len(set(header)) != len(header):
            raise InputError(
                f"expected a first line with one name per column in {path}; got {header}; add a header, each name "
                "once"
            )
        started = reader.line_num + 1
        for row in reader:
            where = f"{path}, line {started}"
            if row and len(row) != len(header):
                raise InputError(
                    f"expected {len(header)} columns in {where}; got {len(row)}; quote fields that hold commas or "
                    "line breaks"
                )
            yield (
                started,
                form.record(dict(zip(header, row, strict=True)), where) if row else TextRecord("", ""),
            )
            started = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"expected CSV in {path}; got '{error}' in the row that starts in line {started}; check its quotes"
        ) from error


def _value(row: Mapping[str, object], name: str, where: str) -> str:
    if name not in row:
        raise InputError(
            f"expected the field {name!r} in {where}; got the fields {sorted(row)}; pass --text-field or --template"
        )
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(
            f"expected text or a number in the field {name!r} of {where}; got {type(value).__name__}; correct the "
            "line or choose another field"
        )
    return str(value)


def _whole(path: Path, numbered: list[tuple[int, TextRecord]]) -> list[TextRecord]:
    if not numbered:
        raise InputError(f"expected at least one record in {path}; got none; check the file")
    empty = [number for number, record in numbered if not record.text.strip()]
    if empty:
        shown = ", ".join(str(number) for number in empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise InputError(
            f"expected text in every record of {path}; got {len(empty)} empty (line {shown}); remove these lines"
        )
    return [record for _, record in numbered]
