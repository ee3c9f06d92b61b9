# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning run is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from accountants import ADD_REMOVE
from accountants.registry import ACCOUNTANTS
from accountants.relations import check_relation
from dpopt.audit.canaries.named import AuditRequest, parsed
from dpopt.estimators.registry import INDIRECT, check_estimator
from dpopt.finetune.record_files import InputError, RecordFormat
from dpopt.finetune.updates import OPTIMIZERS
from dpopt.public_numbers import check_real
from dpopt.randomness.cipher import require_cryptography
from dpopt.sampling.registry import require_sized


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """What `finetune` is asked for. None stands for a default that depends on the data; all of it is public.

    `model` is a folder or a name on the Hugging Face Hub (None: the embedded model); `train` are files of
    records (none: the embedded private docstrings); `lora_rank` 0 trains all weights. With a `noise_multiplier`
    and no `epsilon` there is no budget, only a price; a noise multiplier of 0 makes the run *not private*. A `delta` above
    1 / number of records is refused unless `allow_large_delta`.
    `sampler` is one of `dpopt.sampling.registry`, `relation` says which datasets are neighbours, `secure` takes batches and
    noise from a cipher, `estimator` is one of `dpopt.estimators.ESTIMATORS`, with numbers where wanted.
    `optimizer` is one of `dpopt.finetune.updates.OPTIMIZERS`, and `averaging` the decay of a moving average of the weights,
    which is then what is evaluated and saved. `accountant` None is that of the ledger's last run, else "pld". `resume` goes on with the ledger's last run: with its noise multiplier, and refused where
    anything else that is charged or clipped has changed. `audit`, "canaries=1000" with a kind of `dpopt.audit.canaries.named.KINDS`
    where wanted, adds made-up records whose traces `dpopt audit` looks for.
    """

    model: str | None = None
    train: tuple[Path, ...] = ()
    validation: tuple[Path, ...] = ()
    validation_is_public: bool = False
    form: RecordFormat | None = None
    unit: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    allow_large_delta: bool = False
    noise_multiplier: float | None = None
    accountant: str | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    physical_batch_size: int = 32
    learning_rate: float | None = None
    optimizer: str = "adamw"
    averaging: float | None = None
    lora_rank: int = 0
    clip_norm: float = 1.0
    estimator: str = "flat"
    max_tokens: int | None = None
    eval_every: int | None = None
    sampler: str = "poisson"
    relation: str = ADD_REMOVE
    secure: bool = False
    resume: bool = False
    seed: int = 0
    insecure_seed: int | None = None
    out: Path | None = None
    ledger: Path | None = None
    overwrite: bool = False
    device: str = "auto"
    audit: str | None = None

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_privacy(self)
        _check_sampling(self)
        _check_estimator(self)
        _check_tuning(self)
        self.audited()
        if self.steps is not None and self.epochs is not None:
            raise InputError("expected steps or epochs; got both; leave one out")
        if self.validation and not self.train:
            raise InputError(
                "expected training files beside validation files; got none; pass --train, or leave --validation "
                "out to use the embedded records"
            )
        if self.validation_is_public and not self.validation:
            raise InputError("expected validation files to declare public; got none; pass --validation")
        if self.form is not None and not self.train:
            raise InputError("expected training files to take fields from; got none; pass --train")

    def audited(self) -> AuditRequest | None:
        """The audit that is asked for.

        Raises:
            InputError: it cannot be read.
        """
        try:
            return None if self.audit is None else parsed(self.audit)
        except ValueError as error:
            raise InputError(str(error)) from error


def _check_counts(config: FinetuneConfig) -> None:
    numbers = {
        "steps": config.steps,
        "epochs": config.epochs,
        "batch size": config.batch_size,
        "physical batch size": config.physical_batch_size,
        "learning rate": config.learning_rate,
        "clip norm": config.clip_norm,
        "evaluation interval": config.eval_every,
    }
    for name, value in numbers.items():
        _require_real(name, value)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"expected a {name} above 0; got {value}; pass a positive number")
    if config.lora_rank < 0:
        raise InputError(f"expected a LoRA rank >= 0; got {config.lora_rank}; 0 trains all weights")
    if config.max_tokens is not None and config.max_tokens < 2:
        raise InputError(f"expected at least 2 tokens a record; got {config.max_tokens}; 128 is usual")


def _check_estimator(config: FinetuneConfig) -> None:
    try:
        check_estimator(config.estimator)
    except ValueError as error:
        raise InputError(str(error)) from error
    if config.estimator.startswith("per_adapter") and config.lora_rank == 0:
        raise InputError(
            "expected LoRA adapters to clip per adapter; got LoRA rank 0, which trains all weights; pass "
            "--lora-rank 8, or --estimator per_block"
        )


def _check_tuning(config: FinetuneConfig) -> None:
    if config.optimizer not in OPTIMIZERS:
        raise InputError(
            f"expected an optimizer out of {', '.join(OPTIMIZERS)}; got {config.optimizer!r}; adamw is usual"
        )
    direct = config.estimator.partition(":")[0] not in INDIRECT
    if config.optimizer == "adam-bc" and not direct:
        raise InputError(
            f"expected an estimator whose gradient has the noise of one release with adam-bc; got {config.estimator}, "
            "which makes it of several; pass --optimizer adamw"
        )
    if config.averaging is not None and not 0 < config.averaging < 1:
        raise InputError(f"expected 0 < averaging < 1; got {config.averaging}; 0.95 averages about 20 steps")


def _check_privacy(config: FinetuneConfig) -> None:
    epsilon, delta, noise = config.epsilon, config.delta, config.noise_multiplier
    for name, value in (("epsilon", epsilon), ("delta", delta), ("noise multiplier", noise)):
        _require_real(name, value)
    if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
        raise InputError(
            f"expected a finite epsilon > 0; got {epsilon}; for a run without privacy, to compare with, pass "
            "--noise-multiplier 0 and no --epsilon"
        )
    if delta is not None and not 0 < delta < 1:
        raise InputError(f"expected 0 < delta < 1; got {delta}; choose it below 1 / number of records")
    if noise is not None and not (math.isfinite(noise) and noise >= 0):
        raise InputError(f"expected a finite noise multiplier >= 0; got {noise}; leave it out to compute it")
    if config.accountant is not None and config.accountant not in ACCOUNTANTS:
        raise InputError(
            f"expected an accountant out of {sorted(ACCOUNTANTS)}; got {config.accountant!r}; pld is tight"
        )


def _require_real(name: str, value: object) -> None:
    if value is not None:
        try:
            check_real(name, value)
        except ValueError as error:
            raise InputError(str(error)) from error


def _check_sampling(config: FinetuneConfig) -> None:
    try:
        require_sized(config.sampler)
        check_relation(config.relation)
        if config.secure:
            require_cryptography()
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from error
    if config.resume and config.noise_multiplier is not None:
        raise InputError(
            "expected the noise multiplier of the last run to resume; got --noise-multiplier besides; leave it out"
        )
