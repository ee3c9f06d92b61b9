# SPDX-License-Identifier: Apache-2.0
"""Canaries in the fine-tuning of a language model: sequences that are made up, and the losses that score them.

The law of this file: a canary is made of the model, its tokenizer and a seed, all public, and of no record.

Shapes: B canaries, T tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpopt.audit.canaries.canary import DIRAC, Canaries
from dpopt.audit.canaries.inputs import random_tokens
from dpopt.audit.canaries.named import WEIGHTS, AuditRequest
from dpopt.finetune.language_model import Tokens, collate, logits, padding, quiet
from dpopt.finetune.record_files import InputError
from dpopt.losses import causal_lm_losses

LAYER = "audit_canaries"
LENGTH = 32
TEMPERATURE = 2.0
NEW_TOKENS = "new-tokens"
_AT_ONCE = 64


class LanguageCanaries:
    """The canaries of one run; `finish` scores them for good, and takes their tokens out of the model again."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, canaries: Canaries) -> None:
        self.canaries = canaries
        self._model, self._tokenizer = model, tokenizer
        self._final: dict[int, Tensor] | None = None

    @classmethod
    def made(
        cls,
        request: AuditRequest,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        num_known: int,
        seed: int,
    ) -> LanguageCanaries:
        """Those that were asked for; `num_known` are the tokens of the model before any were added."""
        if request.kind == DIRAC:
            there = {f"{LAYER}.weight": range(request.num)}
            return cls(model, tokenizer, Canaries(request.num, where=there, untouched=True))
        if request.kind == WEIGHTS:
            return cls(model, tokenizer, Canaries(request.num))
        length = min(LENGTH, max_tokens)
        known = [i for i in range(min(len(tokenizer), num_known)) if i not in set(tokenizer.all_special_ids)]
        source = torch.Generator().manual_seed(seed)
        rows = random_tokens(request.num, length, known, source)
        if request.kind == "high-temperature":
            rows = _written(model, rows, length, source)
        if request.kind == NEW_TOKENS:
            for number, row in enumerate(rows):
                row[-1] = num_known + number
        prompt = length - 1 if request.kind == NEW_TOKENS else 0
        records = [Tokens(row, prompt) for row in rows]
        run = cls(model, tokenizer, Canaries(2))
        losses = run._losses
        run.canaries = Canaries(
            request.num, kind=request.kind.replace("-", " "), records=records, losses=losses  # pyright: ignore
        )  # fmt: skip
        return run

    def finish(self, num_known: int | None) -> None:
        """The weights are final: score them once, and cut the vocabulary to `num_known` tokens (None: it is whole)."""
        if hasattr(self._model, LAYER):
            delattr(self._model, LAYER)
        if self.canaries.is_dirac:
            return
        records = cast("Sequence[Tokens]", self.canaries.records)
        losses = self._losses(list(records))
        self._final = {id(record): loss for record, loss in zip(records, losses, strict=True)}
        if num_known is not None:
            resized(self._model, num_known)

    def _losses(self, records: list[Tokens]) -> Tensor:
        if self._final is not None:
            return torch.stack([self._final[id(record)] for record in records])
        device = next(self._model.parameters()).device
        training, found = self._model.training, []
        self._model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(records), _AT_ONCE):
                    part = records[start : start + _AT_ONCE]
                    tokens = collate(part, pad=padding(self._tokenizer), device=device)
                    found.append(causal_lm_losses(logits(self._model, tokens), tokens.labels))
        finally:
            self._model.train(training)
        return torch.cat(found)


def with_room(model: nn.Module, request: AuditRequest | None, *, lora_rank: int) -> int | None:
    """Add to the model what canaries lie in: a layer that never runs, or a token for each.

    Returns:
        The number of tokens that the model had, None where none was added.

    Raises:
        InputError: new tokens are asked for, and the embedding is not trained.
    """
    if request is not None and request.kind == DIRAC:
        device = next(model.parameters()).device
        model.add_module(LAYER, nn.Linear(request.num, 1, bias=False, device=device))
    if request is None or request.kind != NEW_TOKENS:
        return None
    if lora_rank:
        raise InputError(
            f"expected all weights to be trained for canaries of new tokens; got LoRA rank {lora_rank}, which leaves the "
            "embedding as it is; pass kind=random-tokens, or --lora-rank 0"
        )
    known = cast("Any", model).get_input_embeddings().num_embeddings
    resized(model, known + request.num)
    return known


def resized(model: nn.Module, num_tokens: int) -> None:
    """Let the model have so many tokens; new ones begin near the mean of the others."""
    with quiet():
        cast("Any", model).resize_token_embeddings(num_tokens)


def _written(model: nn.Module, starts: list[Tensor], length: int, source: torch.Generator) -> list[Tensor]:
    """Sequences that begin with the first token of `starts` and go on as the model does at a high temperature."""
    device = next(model.parameters()).device
    rows = torch.stack([row[:1] for row in starts])
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            while rows.shape[1] < length:
                parts = [_next(model, part.to(device)) for part in rows.split(_AT_ONCE)]
                drawn = torch.multinomial(torch.cat(parts).cpu(), 1, generator=source)
                rows = torch.cat((rows, drawn), 1)
    finally:
        model.train(training)
    return list(rows)


def _next(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, V) probabilities of the next token."""
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
    return (found.float() / TEMPERATURE).softmax(1)
