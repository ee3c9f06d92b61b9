# SPDX-License-Identifier: Apache-2.0
"""Extraction from a saved language model: secrets and records that stand in files.

The law of this file: the report names no secret and no record; what was extracted is told as numbers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dpopt.attacks.canaries import bits, read_secrets
from dpopt.attacks.curves import Interval
from dpopt.attacks.extraction import Exposure, complete, exposures, rate
from dpopt.attacks.files import Bar, load_attacked, tokens_of
from dpopt.finetune.record_files import InputError, RecordFormat, read_records


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractFiles:
    """What is looked for in which model.

    Args:
        model: as for `AttackFiles`.
        secrets: a file of canaries; None: none.
        records: files of training records.
        prefixes: how many tokens of a record are given.
        form: which fields of a row count.
        max_tokens: of a record.
        device: where the model runs.
    """

    model: str
    secrets: Path | None = None
    records: Sequence[Path] = ()
    prefixes: Sequence[int] = (4, 8, 16, 32)
    form: RecordFormat | None = None
    max_tokens: int | None = None
    device: torch.device | str = "cpu"


@dataclass(frozen=True, slots=True, eq=False)
class ExtractReport:
    """What was found.

    Args:
        exposures: of each secret.
        completions: by number of given tokens, the share of records longer than that which were completed.
        num_records: how many records were tried.
        seconds: how long it took.
    """

    exposures: tuple[Exposure, ...]
    completions: Mapping[int, Interval]
    num_records: int
    seconds: float

    def exposure_rows(self) -> list[tuple[str, ...]]:
        """One row of text for each number of copies: copies, secrets, mean, largest, bits, how many rank first."""
        return [
            (
                "never" if times == 0 else f"{times} x",
                str(len(found)),
                f"{np.mean([one.exposure for one in found]):.2f}",
                f"{max(one.exposure for one in found):.2f}",
                f"{max(bits(one.canary.format) for one in found):.2f}",
                str(sum(one.exposure >= bits(one.canary.format) - 1e-9 for one in found)),
            )
            for times, found in self._by_times().items()
        ]

    def _by_times(self) -> dict[int, list[Exposure]]:
        return {
            times: [one for one in self.exposures if one.canary.times == times]
            for times in sorted({one.canary.times for one in self.exposures})
        }


def extract_files(files: ExtractFiles, bar: Bar) -> ExtractReport:
    """Look for secrets and records in a model.

    Args:
        files: what.
        bar: makes a progress bar.

    Raises:
        InputError: there is nothing to look for, or something cannot be used.
    """
    started = time.perf_counter()
    if files.secrets is None and not files.records:
        raise InputError(
            "expected something to look for; got neither secrets nor records; pass --secrets or --records"
        )
    if any(prefix < 1 for prefix in files.prefixes):
        raise InputError(
            f"expected at least one given token; got {min(files.prefixes)}; a model says nothing after nothing"
        )
    model, tokenizer = load_attacked(files.model)
    model.to(files.device)
    found: list[Exposure] = []
    if files.secrets is not None:
        canaries = read_secrets(files.secrets)
        with bar("exposure", len(canaries)) as seen:
            found = exposures(model, tokenizer, canaries, seen=seen)
    completed: dict[int, Interval] = {}
    tokens = []
    if files.records:
        tokens = tokens_of(read_records(files.records, files.form), model, tokenizer, files.max_tokens)
        with bar("completions", len(tokens)) as seen:
            said = complete(model, tokens, seen=seen)
        lengths = np.array([len(one.ids) for one in tokens])
        for prefix in files.prefixes:
            if (lengths > prefix).any():
                completed[prefix] = rate(said.extracted(prefix)[lengths > prefix])
    return ExtractReport(tuple(found), completed, len(tokens), time.perf_counter() - started)


def to_json(report: ExtractReport) -> str:
    """As JSON: numbers only, no secret and no text."""
    data = {
        "exposures": [
            {
                "inserted": one.canary.times,
                "exposure": one.exposure,
                "most": bits(one.canary.format),
                "rank": one.rank,
                "sampled": one.sampled,
                "fit_p_value": one.fit,
                "log_prob": one.log_prob if math.isfinite(one.log_prob) else None,
            }
            for one in report.exposures
        ],
        "completed_by_prefix": {str(k): v._asdict() for k, v in report.completions.items()},
        "records": report.num_records,
        "seconds": round(report.seconds, 1),
    }
    return json.dumps(data, indent=2, allow_nan=False) + "\n"
