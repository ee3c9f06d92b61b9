# SPDX-License-Identifier: Apache-2.0
"""A run made ready: every input read and checked, every public number settled, nothing written yet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from accountants import Gaussian, UnpricedEvent, leaves, read
from accountants.records import event_of
from dpopt.budget.declaration import accountant_of
from dpopt.budget.prices import require_priced
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.registry import Run, named_estimator
from dpopt.finetune.auditing import LanguageCanaries, with_room
from dpopt.finetune.config import FinetuneConfig
from dpopt.finetune.continued_ledger import LEDGER_NAME, REPORT_NAME, require_reported
from dpopt.finetune.corpus import Corpus, load_corpus
from dpopt.finetune.language_model import device_called, encode, load, longest, with_adapter
from dpopt.finetune.privacy_plan import PrivacyPlan, plan_privacy
from dpopt.finetune.progress import Listener
from dpopt.finetune.record_files import InputError
from dpopt.finetune.run_plan import Prepared, RunPlan
from dpopt.sampling.registry import sized

DEFAULT_OUTS = Path("runs")
DEFAULT_EPOCHS = 3.0
DEFAULT_BATCH_SIZE = 256
LORA_LEARNING_RATE = 5e-3
LEARNING_RATE = 1e-3
# Of the embedded private records, so that a run takes minutes on two cores.
EMBEDDED_STEPS = 30
EMBEDDED_BATCH_SIZE = 512
EMBEDDED_LEARNING_RATE = 4e-3
DEFAULT_MAX_TOKENS = 128
NUM_EVALUATIONS = 6
_OURS = (LEDGER_NAME, REPORT_NAME)


def prepare(config: FinetuneConfig, listener: Listener) -> Prepared:
    """Read and check every input and settle every number; writes nothing.

    Raises:
        InputError: an input cannot be used.
        BudgetExhausted: the budget cannot be met.
    """
    out = _free_out(config)
    require_reported(out, config.ledger or out / LEDGER_NAME)
    listener.stage("reading the records")
    corpus = load_corpus(
        config.train, config.validation, config.validation_is_public, config.form, config.unit
    )
    listener.stage("loading the model")
    name, model, tokenizer = _model(config)
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_known = with_room(model, config.audited(), lora_rank=config.lora_rank)
    listener.stage("computing the noise")
    privacy = _privacy(config, corpus, model, config.ledger or out / LEDGER_NAME)
    max_tokens = _max_tokens(config, model)
    device = device_called(config.device)
    listener.stage("tokenising")
    train = encode(corpus.train, tokenizer, max_tokens=max_tokens)
    validation = encode(corpus.validation, tokenizer, max_tokens=max_tokens)
    plan = RunPlan(
        model=name,
        corpus=corpus.description,
        unit=corpus.unit,
        privacy=privacy,
        delta_chosen=config.delta is None,
        clip_norm=config.clip_norm,
        estimator=config.estimator,
        learning_rate=config.learning_rate or _learning_rate(config.lora_rank, embedded=corpus.embedded),
        optimizer=config.optimizer,
        averaging=config.averaging,
        physical_batch_size=config.physical_batch_size,
        max_tokens=max_tokens,
        lora_rank=config.lora_rank,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        public_validation=len(validation),
        validation_note=corpus.validation_note,
        eval_every=config.eval_every or max(1, math.ceil(privacy.steps / NUM_EVALUATIONS)),
        seed=config.seed,
        insecure_seed=config.insecure_seed,
        secure=config.secure,
        resume=config.resume,
        device=str(device),
        out=out,
        ledger=config.ledger or out / LEDGER_NAME,
        audit=config.audited(),
    )
    model = model.to(device)
    audit = _audit(plan, model, tokenizer, num_known)
    return Prepared(plan, model, tokenizer, train, validation, device, audit, num_known)


def _audit(
    plan: RunPlan, model: nn.Module, tokenizer: PreTrainedTokenizerBase, num_known: int | None
) -> LanguageCanaries | None:
    if plan.audit is None:
        return None
    known = cast("Any", model).get_input_embeddings().num_embeddings if num_known is None else num_known
    return LanguageCanaries.made(
        plan.audit, model, tokenizer, max_tokens=plan.max_tokens, num_known=known, seed=plan.seed
    )


def _free_out(config: FinetuneConfig) -> Path:
    if config.out is None:
        number = 1
        while (out := DEFAULT_OUTS / f"finetune-{number:04d}").exists():
            number += 1
        return out
    out = config.out.expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"expected a folder or a free name as --out; got the file {out}; choose another")
    if out.is_dir() and any(out.iterdir()) and not config.overwrite:
        raise InputError(
            f"expected an empty or new folder as --out; got {out} with files in it; choose another, or pass "
            "--overwrite to replace its model and report (its privacy ledger is never replaced, but continued)"
        )
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_file() for name in _OURS):
        raise InputError(
            f"expected a folder that dpopt made as --out to --overwrite; got {out} without {' or '.join(_OURS)}; "
            "choose another"
        )
    return out


def _model(config: FinetuneConfig) -> tuple[str, nn.Module, PreTrainedTokenizerBase]:
    torch.manual_seed(config.seed)
    if config.model is None:
        from dpopt.embedded import model_path

        name, (model, tokenizer) = "the embedded model", load(str(model_path()))
    else:
        name, (model, tokenizer) = config.model, load(config.model)
    model = with_adapter(model, config.lora_rank) if config.lora_rank else model
    return name, model.train(), tokenizer


def _max_tokens(config: FinetuneConfig, model: nn.Module) -> int:
    most = longest(model)
    if config.max_tokens is not None and most is not None and config.max_tokens > most:
        raise InputError(
            f"expected at most {most} tokens a record, which is what the model takes; got {config.max_tokens}; lower "
            "--max-tokens"
        )
    return config.max_tokens or min(DEFAULT_MAX_TOKENS, most or DEFAULT_MAX_TOKENS)


def _privacy(config: FinetuneConfig, corpus: Corpus, model: nn.Module, ledger: Path) -> PrivacyPlan:
    number = len(corpus.train)
    usual = EMBEDDED_BATCH_SIZE if corpus.embedded else min(DEFAULT_BATCH_SIZE, max(1, number // 8))
    batch_size = config.batch_size or usual
    if batch_size > number:
        raise InputError(
            f"expected a batch size of at most {number}, the number of records; got {batch_size}; lower it"
        )
    steps = config.steps
    if steps is None and config.epochs is None and corpus.embedded:
        steps = EMBEDDED_STEPS
    steps = steps or max(1, round((config.epochs or DEFAULT_EPOCHS) * number / batch_size))
    try:
        return plan_privacy(
            num_records=number,
            batch_size=batch_size,
            steps=steps,
            epsilon=config.epsilon,
            delta=config.delta,
            noise_multiplier=_resumed_noise(ledger) if config.resume else config.noise_multiplier,
            accountant_name=config.accountant or accountant_of(ledger),
            ledger=ledger,
            estimator=_estimator(config, model, number, batch_size),
            sampler=config.sampler,
            relation=config.relation,
            allow_large_delta=config.allow_large_delta,
            num_canaries=0 if (audit := config.audited()) is None else audit.num,
        )
    except UnpricedEvent as error:
        raise InputError(str(error)) from error
    except IsADirectoryError as error:
        raise InputError(f"expected a file as --ledger; got the folder {ledger}; name a file") from error


def _estimator(config: FinetuneConfig, model: nn.Module, num_records: int, batch_size: int) -> Estimator:
    sampling = sized(config.sampler, num_records=num_records, batch_size=batch_size)
    estimator = named_estimator(config.estimator, Run(model, config.clip_norm, num_records, sampling))
    require_priced(estimator, config.relation)
    return estimator


def _resumed_noise(ledger: Path) -> float:
    """The noise multiplier that the last run on the ledger declared."""
    declared = [] if not ledger.exists() else [r for r in read(ledger).records if r.kind == "attempt"]
    event = next((event for record in reversed(declared) if (event := event_of(record))), None)
    found = () if event is None else leaves(event)
    inner = getattr(found[0][0], "event", found[0][0]) if len(found) == 1 else None
    if not isinstance(inner, Gaussian):
        raise InputError(
            f"expected a ledger with the run to resume; got none with Gaussian noise in {ledger}; name it with --ledger "
            "or its folder with --out and --overwrite, or leave --resume out"
        )
    return inner.noise_multiplier


def _learning_rate(lora_rank: int, *, embedded: bool) -> float:
    if lora_rank:
        return LORA_LEARNING_RATE
    return EMBEDDED_LEARNING_RATE if embedded else LEARNING_RATE
