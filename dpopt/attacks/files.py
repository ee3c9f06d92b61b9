# SPDX-License-Identifier: Apache-2.0
"""Attacks on what stands in files: a saved language model, records of members and of non-members, shadow models.

The law of this file: nothing is trained or written here, and no record of one file is silently dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpopt.attacks.battery import AttackReport, Signals, run_attacks
from dpopt.attacks.language_signals import sequence_losses, token_signals
from dpopt.attacks.shadow import finished, places_of, read_plan, record_digest
from dpopt.attacks.signals import Seen
from dpopt.finetune.language_model import Tokens, encode, load, longest, quiet
from dpopt.finetune.record_files import InputError, RecordFormat, TextRecord, read_records

Bar = Callable[[str, int], AbstractContextManager[Seen]]
"""(what is done, how many records) -> a block with a function that is told how many more are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackFiles:
    """What is attacked, and with what.

    Args:
        model: a folder of save_pretrained, of an adapter, or of a run of `dpopt finetune`; or a name on the Hub.
        members: files of records that took part in its training.
        non_members: files of records that did not.
        references: models that saw none of them, e.g. the one that training began from.
        shadows: a folder of `dpopt audit shadow`, whose pool holds all of them.
        form: which fields of a row count; those of the training.
        max_tokens: of a record; those of the training.
        confidence: of intervals, and of all bounds together.
        delta: at which epsilon is bounded.
        gaussian: see `run_attacks`.
        device: where the models run.
        cache: a folder for signals; None keeps none. Those of shadow models are kept in their folder.
    """

    model: str
    members: Sequence[Path]
    non_members: Sequence[Path]
    references: Sequence[str] = ()
    shadows: Path | None = None
    form: RecordFormat | None = None
    max_tokens: int | None = None
    confidence: float = 0.95
    delta: float = 1e-5
    gaussian: bool = False
    device: torch.device | str = "cpu"
    cache: Path | None = None


def attack_files(files: AttackFiles, bar: Bar) -> AttackReport:
    """Attack the model.

    Args:
        files: what.
        bar: makes a progress bar.

    Returns:
        The report.

    Raises:
        InputError: something cannot be used; it says what.
    """
    started = time.perf_counter()
    members, non_members = (
        read_records(files.members, files.form),
        read_records(files.non_members, files.form),
    )
    refuse_shared(members, non_members)
    records = [*members, *non_members]
    model, tokenizer = load_attacked(files.model)
    tokens = tokens_of(records, model, tokenizer, files.max_tokens)
    references = [load_attacked(name)[0].to(files.device) for name in files.references]
    with bar("signals", len(tokens)) as seen:
        signals = token_signals(
            model.to(files.device), tokens, references=references, cache=files.cache, seen=seen
        )
    shadows, included = _shadows(files, records, tokens, bar)
    lengths = np.array([len(one.ids) for one in tokens], dtype=np.float64)
    controls = {"length": lengths}
    if signals.reference is not None:
        controls["loss under the references"] = -signals.reference_losses
    about = {
        "model": files.model,
        "members": [str(path) for path in files.members],
        "non-members": [str(path) for path in files.non_members],
        "references": list(files.references),
        "shadow models": 0 if shadows is None else len(shadows),
        "device": str(files.device),
    }
    report = run_attacks(
        Signals(
            signals.losses, signals, None if signals.reference is None else signals.reference_losses[None], shadows, included
        ),
        np.arange(len(records)) < len(members),
        delta=files.delta,
        confidence=files.confidence,
        gaussian=files.gaussian,
        controls=controls,
        about=about,
    )  # fmt: skip
    cast("dict[str, object]", report.about)["seconds"] = round(time.perf_counter() - started, 1)
    return report


def load_attacked(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a folder (also of an adapter or of a whole run) or the Hub.

    Raises:
        InputError: there is none.
    """
    folder = Path(name).expanduser()
    for inner in ("model", "adapter"):
        if not (folder / "config.json").is_file() and (folder / inner).is_dir():
            folder = folder / inner
    if not (folder / "adapter_config.json").is_file():
        return load(str(folder) if folder.is_dir() else name)
    from peft import AutoPeftModelForCausalLM

    with quiet():
        try:
            model = cast("Any", AutoPeftModelForCausalLM.from_pretrained(str(folder)))
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(
                f"expected an adapter whose base model can be loaded at {folder}; got {type(error).__name__}; keep the base "
                "model where the adapter's configuration says"
            ) from error
    return cast("nn.Module", model.float()), cast("PreTrainedTokenizerBase", tokenizer)


def tokens_of(
    records: Sequence[TextRecord],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
) -> list[Tokens]:
    """The records as the model's tokens, cut as `dpopt finetune` cuts them.

    Raises:
        InputError: a record has no token that is scored.
    """
    most = longest(model)
    limit = max_tokens if max_tokens is not None else min(128, most or 128)
    if most is not None and limit > most:
        raise InputError(
            f"expected at most the {most} tokens that the model takes; got {limit}; lower --max-tokens"
        )
    tokens = encode(records, tokenizer, max_tokens=limit)
    empty = sum(len(one.ids) <= max(one.num_prompt, 1) for one in tokens)
    if empty:
        raise InputError(
            f"expected a token to score in every record; got {empty} without, cut at {limit} tokens; raise --max-tokens, or "
            "remove these records from their file"
        )
    return tokens


def refuse_shared(members: Sequence[TextRecord], non_members: Sequence[TextRecord]) -> None:
    """Refuse records that stand on both sides."""
    known = set(members)
    shared = sum(record in known for record in non_members)
    if shared:
        raise InputError(
            f"expected non-members that are no members; got {shared} records that are in both files; remove them from one"
        )


def _shadows(
    files: AttackFiles, records: Sequence[TextRecord], tokens: Sequence[Tokens], bar: Bar
) -> tuple[np.ndarray | None, np.ndarray | None]:
    if files.shadows is None:
        return None, None
    plan, models = read_plan(files.shadows), finished(files.shadows)
    if not models:
        raise InputError(
            f"expected at least two finished shadow models in {files.shadows}; got none; run dpopt audit shadow to its end"
        )
    places = places_of(plan, [record_digest(record) for record in records])
    losses = []
    for number, path in enumerate(models):
        with bar(f"shadow model {number + 1} of {len(models)}", len(tokens)) as seen:
            model = load_attacked(str(path))[0].to(files.device)
            losses.append(sequence_losses(model, tokens, cache=files.shadows / "signals", seen=seen))
    return np.stack(losses), plan.included(len(models))[:, places]
