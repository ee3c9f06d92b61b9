# SPDX-License-Identifier: Apache-2.0
"""From a plan and what came of it to a report."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

from accountants import ADD_REMOVE, REPLACE, ZERO_OUT, Bound
from dpopt.finetune.progress import StepSeen
from dpopt.finetune.run_plan import RunPlan
from dpopt.reports.report import Report

NEIGHBOURS = {
    ADD_REMOVE: "they differ by adding or removing one record",
    REPLACE: "they differ by replacing one record; their number is public",
    ZERO_OUT: "they differ by emptying one record, which then contributes nothing; their number is public",
}
SAMPLERS = {
    "poisson": "Poisson: every record takes part in every step independently, with the probability below",
    "truncated-poisson": "Poisson, with the probability below, and batches cut to a public largest size",
    "balls-in-bins": "balls in bins: once an epoch every record joins one batch by a coin of its own",
    "shuffled": "shuffled: once an epoch a new order of the records is cut into batches",
    "cyclic": "cyclic: the records in their order, the same batches every epoch",
    "fixed-size": "fixed size: every step an even choice of a public number of records",
}
ACCOUNTANTS = {
    "pld": "PLD (privacy loss on a grid, rounded up)",
    "prv": "PRV (Fourier, upper end of its error band, or as PLD)",
    "rdp": "RDP (Renyi orders)",
    "zcdp": "zCDP (one number for all orders; sampling is not amplified)",
}
_PACKAGES = (
    "dpopt",
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "prv-accountant",
)
_SECRET = (
    "keyed by 256 secret bits of the operating system, a stream of its own for each draw and each tensor"
)
_FLOATING_POINT = (
    "Noise is drawn as float32 from fast statistical generators, and the mathematics is that of real numbers: "
    "attacks on rounding or on the generator are not covered."
)
_CIPHER = "AES-256 in counter mode, keyed by 256 secret bits of the operating system; batches drawn exactly"
_ON_A_GRID = (
    "Noise is drawn exactly, as whole cells of a grid, and added to sums rounded to it; the sums themselves are "
    "computed in floats, whose rounding the assumptions bound. Timing is not covered."
)
_SCOPE = (
    "the trained weights, and all versions of them during the run; the number of records counts as public"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a run; all of it public. `stopped` names what ended it early."""

    steps: int
    bound: Bound
    ledger_id: str
    ledger_head: str
    num_charges: int
    history: tuple[StepSeen, ...]
    seconds: float
    stopped: str | None


def build_report(plan: RunPlan, outcome: Outcome) -> Report:
    """The report of a run."""
    privacy = plan.privacy
    losses = [seen.loss for seen in outcome.history if seen.loss is not None]
    ended = outcome.stopped is None
    return Report(
        title=f"Private fine-tuning of {plan.model}",
        unit=plan.unit,
        neighbouring_relation=NEIGHBOURS[privacy.relation],
        epsilon=outcome.bound.epsilon,
        delta=outcome.bound.delta,
        epsilon_method=outcome.bound.method,
        assumptions=outcome.bound.assumptions,
        accountant=ACCOUNTANTS.get(privacy.accountant, privacy.accountant.upper()),
        budget=privacy.budget,
        sampler=SAMPLERS[privacy.sampler],
        sampling_rate=privacy.sampling_rate,
        expected_batch_size=float(privacy.batch_size),
        steps=outcome.steps,
        steps_planned=privacy.steps,
        stopped=outcome.stopped,
        noise_multiplier=privacy.noise_multiplier,
        clip_norm=plan.clip_norm,
        estimator=plan.estimator,
        guarantee=privacy.estimator.guarantee,
        dtype="float32",
        device=plan.device,
        randomness=_randomness(plan),
        insecure_seed=plan.insecure_seed,
        floating_point=_ON_A_GRID if plan.secure else _FLOATING_POINT,
        scope=_SCOPE,
        limitations=_limitations(plan, outcome),
        num_records=privacy.num_records,
        data=plan.corpus,
        validation=plan.validation_note,
        num_validation=plan.public_validation,
        loss_before=losses[0] if losses else None,
        loss_after=losses[-1] if losses and ended else None,
        model=plan.model,
        tuning=f"LoRA adapters of rank {plan.lora_rank}" if plan.lora_rank else "all weights",
        saved_as="adapter" if plan.lora_rank else "model",
        num_parameters=plan.num_parameters,
        num_trainable=plan.num_trainable,
        learning_rate=plan.learning_rate,
        optimizer=_optimizer(plan),
        physical_batch_size=plan.physical_batch_size,
        max_tokens=plan.max_tokens,
        model_seed=plan.seed,
        seconds=outcome.seconds,
        ledger=str(plan.ledger),
        ledger_id=outcome.ledger_id,
        ledger_head=outcome.ledger_head,
        ledger_charges=outcome.num_charges,
        ledger_charges_before=privacy.num_spent,
        versions=versions(),
        audit=None if plan.audit is None else f"{plan.audit.num} canaries ({plan.audit.kind})",
        curve=tuple((seen.step, seen.epsilon, seen.loss) for seen in outcome.history),
    )


def _optimizer(plan: RunPlan) -> str:
    if plan.averaging is None:
        return plan.optimizer
    return f"{plan.optimizer}; saved is the moving average of the weights, of decay {plan.averaging:g}"


def _randomness(plan: RunPlan) -> str:
    if plan.insecure_seed is not None:
        return "a public seed: not private"
    return _CIPHER if plan.secure else _SECRET


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that take part."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _limitations(plan: RunPlan, outcome: Outcome) -> tuple[str, ...]:
    privacy = plan.privacy
    always = (
        "Text that stands in several records: k records that belong together are protected k times more weakly.",
        "The data that the base model was pretrained on, and its tokenizer.",
        "Other runs on the same data with a ledger of their own: give all of them one ledger (--ledger) to have them "
        "counted together, runs to choose settings included.",
    )
    said = []
    if plan.insecure_seed is not None:
        said.append("Anything: the randomness of this run came from a public seed.")
    if privacy.delta >= 1 / privacy.num_records:
        said.append(
            f"Delta {privacy.delta:g} is not below 1 / number of records: such a delta allows to publish a record."
        )
    if privacy.num_spent:
        said.append(
            f"The ledger held {privacy.num_spent} charges before. The sum assumes that this run was not designed "
            "after looking at what they released."
        )
    if outcome.stopped is not None:
        said.append(
            "The run was stopped early. If somebody stopped it because of what it had shown, the epsilon that holds "
            f"is that of all planned steps: {privacy.epsilon:.3f}."
        )
    return (*said, *always)
