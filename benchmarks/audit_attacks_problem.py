# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.audit_attacks` trains on: descriptions, canaries of two kinds, and all coins, drawn by a seed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dpopt.attacks.canaries import DIGITS, SecretCanary, SecretFormat, draw_secrets, symbol_tokens
from dpopt.finetune.language_model import Tokens, encode, load
from dpopt.finetune.record_files import InputError, TextRecord

NAMES = ("Ann", "Bob")
TIMES = (0, 0, 1, 8)


@dataclass(frozen=True)
class Setting:
    """One cell: which model, at which epsilon (infinite: no noise, no clipping), trained how."""

    model: str
    epsilon: float
    rate: float = 0.25
    steps: int = 30
    learning_rate: float = 3e-3
    optimizer: str = "adamw"
    num_pool: int = 300
    num_canaries: int = 600
    max_tokens: int = 48
    seed: int = 1

    @property
    def name(self) -> str:
        """Of the cell's file."""
        return f"{self.model}-{self.epsilon:g}-{self.optimizer}-{self.rate:g}x{self.steps}-{self.num_canaries}-{self.seed}"


@dataclass(frozen=True, eq=False)
class Problem:
    """The base model with a row for each canary's token, the records, and all coins."""

    model: nn.Module
    tokenizer: Any
    pool: list[TextRecord]
    tokens: list[Tokens]
    member: np.ndarray
    canaries: list[Tokens]
    included: np.ndarray
    secrets: list[SecretCanary]

    @property
    def train(self) -> list[Tokens]:
        """All records that take part."""
        texts = [TextRecord("", one.text) for one in self.secrets for _ in range(one.times)]
        return [
            *(one for one, inside in zip(self.tokens, self.member, strict=True) if inside),
            *(one for one, inside in zip(self.canaries, self.included, strict=True) if inside),
            *encode(texts, self.tokenizer, max_tokens=64),
        ]


def problem(setting: Setting, models: dict[str, Path], data: Path) -> Problem:
    """The same records, canaries and coins for every epsilon."""
    model, tokenizer = load(str(models[setting.model]))
    random = np.random.default_rng(setting.seed)
    rows = [json.loads(line) for line in (data / "e2e_nlg" / "train.jsonl").read_text().splitlines()]
    texts = list(dict.fromkeys(row["ref"] for row in rows))
    pool = [TextRecord("", texts[i]) for i in random.permutation(len(texts))[: setting.num_pool]]
    tokens = encode(pool, tokenizer, max_tokens=setting.max_tokens)
    member, included = random.random(len(pool)) < 0.5, random.random(setting.num_canaries) < 0.5
    canaries = new_tokens(model, tokenizer.bos_token_id or 0, setting.num_canaries)
    secrets = draw_secrets(formats(tokenizer), TIMES, seed=setting.seed)
    return Problem(model, tokenizer, pool, tokens, member, canaries, included, secrets)


@torch.no_grad()
def new_tokens(model: nn.Module, before: int, number: int) -> list[Tokens]:
    """Records of two tokens, the second one that no other record has; its row is made likely after the first.

    A row that starts along the hidden state, with a logit that gives all new tokens together nearly all of the
    probability, gets nearly all of the canary's gradient: what stands before it is public and need not be learnt.
    """
    whole: Any = model
    context = torch.tensor([[before]])
    hidden = whole.model(input_ids=context).last_hidden_state[0, -1]
    old = whole.config.vocab_size
    logit = whole.lm_head(hidden).max() + 5 - math.log(number)
    whole.resize_token_embeddings(old + number, mean_resizing=False)
    whole.get_input_embeddings().weight[old:] = hidden * (logit / hidden.square().sum())
    return [Tokens(torch.tensor([before, old + i]), 1) for i in range(number)]


def formats(tokenizer: Any) -> list[SecretFormat]:
    """Secrets of 3 digits, or of letters where the tokenizer joins digits."""
    for separator, alphabet in (("", DIGITS), (" ", tuple("abcdefghij"))):
        found = [SecretFormat(f"the code of {name} is", 3, alphabet, separator) for name in NAMES]
        try:
            for one in found:
                symbol_tokens(one, tokenizer)
        except InputError:
            continue
        return found
    raise InputError("expected a tokenizer with digits or letters of one token; got another; add a format")
