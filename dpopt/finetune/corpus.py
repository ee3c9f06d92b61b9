# SPDX-License-Identifier: Apache-2.0
"""The data of a run: private training records, and held-out records only where somebody declared them public."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpopt.finetune.record_files import (
    InputError,
    RecordFormat,
    TextRecord,
    read_records,
    refuse_overlap,
    refuse_repeated,
)

DEFAULT_UNIT = "one record of the training data"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training records (secret) and public validation records (possibly none), with how they are called."""

    train: list[TextRecord]
    validation: list[TextRecord]
    description: str
    unit: str
    validation_note: str
    embedded: bool


def load_corpus(
    train: Sequence[Path],
    validation: Sequence[Path],
    validation_is_public: bool,
    form: RecordFormat | None = None,
    unit: str | None = None,
) -> Corpus:
    """Read and check all files; without training files, the embedded private docstrings.

    Validation records that were not declared public are checked and then dropped.
    """
    if not train:
        return _embedded(unit)
    refuse_repeated([*train, *validation])
    records = read_records(train, form)
    held_out = read_records(validation, form) if validation else []
    refuse_overlap(records, held_out)
    if len(records) < 2:
        raise InputError(
            f"expected at least 2 training records; got {len(records)}; nobody hides in a crowd of one"
        )
    return Corpus(
        train=records,
        validation=held_out if validation_is_public else [],
        description=", ".join(path.name for path in train),
        unit=unit or DEFAULT_UNIT,
        validation_note=_note(bool(validation), validation_is_public),
        embedded=False,
    )


def _note(given: bool, public: bool) -> str:
    if not given:
        return "none given: no loss is shown"
    if public:
        return "declared public by whoever started the run; its loss is shown"
    return "given, but not declared public: not used, and no loss is shown (--validation-is-public)"


def _embedded(unit: str | None) -> Corpus:
    from dpopt.embedded import private_records

    found = private_records()
    sources = ", ".join(f"{package} {version}" for package, version in found.sources)
    return Corpus(
        train=[TextRecord("", text) for text in found.train],
        validation=[TextRecord("", text) for text in found.validation],
        description=f"embedded private records: docstrings of {sources}",
        unit=unit or found.unit,
        validation_note="docstrings of other modules of the same packages, declared public by dpopt for this example",
        embedded=True,
    )
