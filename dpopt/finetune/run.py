# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a causal language model under an (epsilon, delta) budget.

The law of this file: what leaves the training loop is public: steps, seconds, prices, and losses on data that
somebody declared public. Losses of private records, sizes of drawn batches and numbers of tokens never leave it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dpopt.budget.budget import Budget
from dpopt.finetune.config import FinetuneConfig
from dpopt.finetune.evaluation import mean_loss
from dpopt.finetune.language_model import TokenBatch, collate, logits, padding
from dpopt.finetune.prepare import prepare
from dpopt.finetune.privacy_plan import PrivacyPlan
from dpopt.finetune.progress import Listener, Silence, StepSeen
from dpopt.finetune.run_plan import Prepared
from dpopt.finetune.run_report import Outcome, build_report
from dpopt.finetune.saving import NotSaved, check_room, save_all
from dpopt.finetune.updates import Tuning
from dpopt.losses import causal_lm_losses
from dpopt.mechanisms import GaussianMechanism
from dpopt.reports.report import Report
from dpopt.sampling.sampler import Batch
from dpopt.training import PrivateTraining


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """A finished run: the tuned model in memory, and where it and its report were written."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    report: Report
    saved_as: Path
    out: Path


@dataclass(slots=True)
class _Run:
    """What a run works with, and what was shown of it so far."""

    prepared: Prepared
    listener: Listener
    history: list[StepSeen] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


def finetune(config: FinetuneConfig, *, listener: Listener | None = None) -> FinetuneResult:
    """Fine-tune a language model so that its weights are differentially private in each training record.

    Writes `<out>/model` (or `<out>/adapter`), `report.json`, `report.md`, `report.html`, `curves.png` and the
    privacy ledger. A run that is stopped after its first step saves and reports what it has before the error
    goes on.

    Raises:
        InputError: an input cannot be used; nothing was written.
        BudgetExhausted: the budget cannot be met; nothing was charged.
        NotSaved: the model or its report could not be written to `out`; the message says what stands where.

    Guarantees
    ----------
    The released weights are a function of the gradients that `PrivateTraining` released, which compose to the
    events on the ledger (its Guarantees), and of public numbers. Each record's loss is divided by that record's
    own tokens (test_guarantee_a_records_loss_does_not_depend_on_its_batch).
    """
    run = _Run(prepare(config, listener or Silence()), listener or Silence())
    prepared, plan = run.prepared, run.prepared.plan
    private = _private(prepared)
    check_room(prepared.model, plan.out)
    run.listener.planned(plan)
    failure: BaseException | None = None
    with private:
        try:
            _train(run, private)
        except BaseException as error:
            if private.steps == 0:
                raise
            failure = error
        if prepared.audit is not None:
            prepared.audit.finish(prepared.num_known)
        report = build_report(plan, _outcome(run, private, failure))
        run.listener.stage("saving")
        try:
            saved_as = save_all(prepared, report)
        except NotSaved as error:
            if failure is not None:
                error.add_note(
                    f"the run had stopped after {report.steps} of {report.steps_planned} steps: {failure}"
                )
            raise
    if failure is not None:
        failure.add_note(
            f"the weights after {report.steps} steps are in {saved_as}, with their report beside them"
        )
        raise failure
    return FinetuneResult(prepared.model, prepared.tokenizer, report, saved_as, plan.out)


def _private(prepared: Prepared) -> PrivateTraining:
    plan, privacy = prepared.plan, prepared.plan.privacy
    # Public tokens: the probe asks whether the model keeps examples apart.
    tokens = torch.arange(16, device=prepared.device).view(2, 8)
    return PrivateTraining(
        prepared.model,
        estimator=privacy.estimator,
        mechanism=GaussianMechanism(privacy.noise_multiplier),
        sampling=privacy.records_sampling,
        budget=_budget(privacy),
        ledger=plan.ledger,
        accountant_name=privacy.accountant,
        unit=plan.unit,
        relation=privacy.relation,
        example_inputs={"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False},
        randomness="secure" if plan.secure else "fast",
        insecure_seed=plan.insecure_seed,
        # Without resume the plan has settled and shown what this run adds to the ledger.
        new_configuration=not plan.resume,
        audit=None if prepared.audit is None else prepared.audit.canaries,
    )


def _budget(privacy: PrivacyPlan) -> Budget | None:
    # The plan has settled whether so large a delta was asked for.
    return None if privacy.budget is None else Budget(privacy.budget, privacy.delta, allow_large_delta=True)


def _train(run: _Run, private: PrivateTraining) -> None:
    prepared, plan = run.prepared, run.prepared.plan
    steps, price = plan.privacy.steps, plan.privacy.prices()
    tuning = Tuning(
        prepared.model, private, optimizer=plan.optimizer, learning_rate=plan.learning_rate, steps=steps,
        averaging=plan.averaging,
    )  # fmt: skip
    _show(run, 0, price(0), evaluate=True)
    try:
        for step, batch in enumerate(private.batches(prepared.train, steps=steps), start=1):
            _accumulate(prepared, private, batch)
            private.release()
            tuning.step()
            with tuning.shown():
                _show(run, step, price(step), evaluate=step % plan.eval_every == 0 or step == steps)
    finally:
        tuning.finish()


def _accumulate(prepared: Prepared, private: PrivateTraining, batch: Batch) -> None:
    # Records of similar length share a physical batch: it saves padding and changes no clipped gradient.
    order = sorted(range(len(batch.examples)), key=lambda i: len(batch.examples[i].ids))  # pyright: ignore[reportAttributeAccessIssue]
    by_length = Batch(tuple(batch.examples[i] for i in order), tuple(batch.indices[i] for i in order))
    for part in by_length.parts(prepared.plan.physical_batch_size):
        tokens = collate(part.examples, pad=padding(prepared.tokenizer), device=prepared.device)  # pyright: ignore[reportArgumentType]
        private.evaluate(partial(_losses, prepared.model, tokens), records=part.indices)


def _losses(model: nn.Module, tokens: TokenBatch) -> Tensor:
    return causal_lm_losses(logits(model, tokens), tokens.labels)


def _show(run: _Run, step: int, epsilon: float, *, evaluate: bool) -> None:
    prepared, loss = run.prepared, None
    if evaluate and prepared.validation:
        loss = mean_loss(
            prepared.model,
            prepared.validation,
            batch_size=prepared.plan.physical_batch_size,
            pad=padding(prepared.tokenizer),
            device=prepared.device,
        )
    seen = StepSeen(step, epsilon, loss, time.monotonic() - run.started)
    run.history.append(seen)
    run.listener.stepped(seen)


def _outcome(run: _Run, private: PrivateTraining, failure: BaseException | None) -> Outcome:
    return Outcome(
        steps=private.steps,
        bound=private.bound(run.prepared.plan.privacy.delta),
        ledger_id=private.ledger.id,
        ledger_head=private.ledger.head,
        num_charges=private.ledger.num_charges,
        history=tuple(run.history),
        seconds=time.monotonic() - run.started,
        stopped=None if failure is None else type(failure).__name__,
    )
