# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning run is going to do, settled before it begins, and what it works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpopt.audit.canaries.named import AuditRequest
from dpopt.finetune.auditing import LanguageCanaries
from dpopt.finetune.language_model import Tokens
from dpopt.finetune.privacy_plan import PrivacyPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Everything that is settled and shown before the first step; all of it public."""

    model: str
    corpus: str
    unit: str
    privacy: PrivacyPlan
    delta_chosen: bool
    clip_norm: float
    estimator: str
    learning_rate: float
    optimizer: str
    averaging: float | None
    physical_batch_size: int
    max_tokens: int
    lora_rank: int
    num_parameters: int
    num_trainable: int
    public_validation: int
    validation_note: str
    eval_every: int
    seed: int
    insecure_seed: int | None
    secure: bool
    resume: bool
    device: str
    out: Path
    ledger: Path
    audit: AuditRequest | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan, and what it works with: the model on its device, and the records as tokens (the training ones secret)."""

    plan: RunPlan
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    train: list[Tokens]
    validation: list[Tokens]
    device: torch.device
    audit: LanguageCanaries | None = None
    num_known: int | None = None
