# SPDX-License-Identifier: Apache-2.0
"""E2E with a small causal language model: short rows, loss on the reference alone."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.estimators.problem import Problem
from benchmarks.finetuning import Example, collate, held_out, load
from benchmarks.utility import encode
from dpopt import causal_lm_losses

CHARACTERS = 160
"""Longer rows are left out, for the time that they take."""
NUM_VALIDATION = 270
TUNING = 1000
"""Seeds from here on are scored on validation rows of their own."""


def _short(path: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if len(row["mr"]) + len(row["ref"]) <= CHARACTERS]


@lru_cache(maxsize=1)
def _read(data: str, model: str) -> tuple[list[dict[str, str]], list[dict[str, str]], Any]:
    from transformers import AutoTokenizer

    folder = Path(data) / "e2e_nlg"
    train, validation = _short(folder / "train.jsonl"), _short(folder / "validation.jsonl")
    random.Random(0).shuffle(validation)
    return train, validation, AutoTokenizer.from_pretrained(model)


def drawn(data: str, model_path: str, num_records: int, seed: int) -> Problem:
    """`num_records` short rows to train on, and the model as it was pretrained."""
    rows, held, tokenizer = _read(data, model_path)
    pad = tokenizer.pad_token_id or 0
    train: list[Example] = [encode(tokenizer, r) for r in random.Random(seed).sample(rows, num_records)]
    first = NUM_VALIDATION if seed >= TUNING else 0
    validation = [encode(tokenizer, row) for row in held[first : first + NUM_VALIDATION]]
    model = load(Path(model_path))

    def losses(indices) -> Tensor:
        ids, labels = collate([train[i] for i in indices], pad)
        return causal_lm_losses(model(input_ids=ids).logits, labels)

    def scores() -> dict[str, float]:
        return {"validation nats per token": held_out(model, validation, pad)}

    return Problem(model, losses, scores, [len(example.ids) for example in train])
