# SPDX-License-Identifier: Apache-2.0
"""What a fine-tuning run looks like in a terminal: what will be claimed, how far it is, what came out."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table

from dpopt.finetune import FinetuneResult, RunPlan, StepSeen
from dpopt.finetune.run_report import NEIGHBOURS, SAMPLERS
from dpopt.reports.report import Report, number, rounded_up


class Screen:
    """A listener that draws: tables on `console`, the progress bar and remarks on `errors` (standard error)."""

    def __init__(self, console: Console, errors: Console) -> None:
        self._console = console
        self._errors = errors
        self._status: Status | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._loss: float | None = None
        self._first = 0.0

    def __enter__(self) -> Self:
        """Start with nothing drawn."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop what moves."""
        self._still()

    def _still(self) -> None:
        if self._status is not None:
            self._status.stop()
        if self._progress is not None:
            self._progress.stop()
        self._status = self._progress = None

    def stage(self, text: str) -> None:
        """Show what is being done; one line each where nothing can move."""
        self._still()
        if self._errors.is_terminal:
            self._status = self._errors.status(f"{text} ...")
            self._status.start()
        else:
            self._errors.print(f"dpopt: {text} ...", highlight=False)

    def planned(self, plan: RunPlan) -> None:
        """Show what will be claimed, and make the bar."""
        self._still()
        self._console.print(_claim(plan))
        for warning in _warnings(plan):
            self._errors.print(f"[bold yellow]warning:[/] {escape(warning)}", soft_wrap=True)
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=self._errors,
        )
        self._task = self._progress.add_task("training", total=plan.privacy.steps, told="")
        self._progress.start()

    def stepped(self, seen: StepSeen) -> None:
        """Move the bar; without a terminal, one line for each look at public validation data."""
        if seen.step == 0:
            self._first = seen.seconds
        self._loss = self._loss if seen.loss is None else seen.loss
        speed = seen.step / max(seen.seconds - self._first, 1e-9)
        told = f"epsilon [cyan]{rounded_up(seen.epsilon)}[/]"
        told += "" if self._loss is None else f"  loss [magenta]{self._loss:.3f}[/]"
        told += "" if seen.step == 0 else f"  {number(speed)} steps/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=seen.step, told=told)
        if not self._errors.is_terminal and seen.loss is not None:
            self._errors.print(f"dpopt: step {seen.step}  {told}", highlight=False)

    def finished(self, result: FinetuneResult) -> None:
        """Show what came out and how to load it."""
        report, folder = result.report, result.saved_as
        self._console.print(_result(report, result))
        loading = (
            f'AutoPeftModelForCausalLM.from_pretrained("{folder}")'
            if report.saved_as == "adapter"
            else f'AutoModelForCausalLM.from_pretrained("{folder}")'
        )
        self._console.print(f"Load it with [bold]{escape(loading)}[/]", highlight=False, soft_wrap=True)
        anchor = f"dpopt ledger verify {report.ledger} --head {report.ledger_head}"
        if report.audit is not None:
            asking = f"dpopt audit {result.out}"
            self._console.print(
                f"Ask what it leaked: [bold]{escape(asking)}[/]", highlight=False, soft_wrap=True
            )
        self._console.print(
            f"Keep this line elsewhere, it shows that no charge was taken back: [bold]{escape(anchor)}[/]",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def _table(title: str, rows: list[tuple[str, str]]) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, escape(value))
    return Panel(grid, title=title, title_align="left", expand=False)


def _claim(plan: RunPlan) -> Panel:
    privacy = plan.privacy
    chosen = " (chosen here, below 1 / number of records)" if plan.delta_chosen else ""
    before = f", on top of {privacy.num_spent} earlier charges" if privacy.num_spent else ""
    kind = f"LoRA of rank {plan.lora_rank}" if plan.lora_rank else "all weights"
    return _table(
        "What will be claimed",
        [
            ("model", f"{plan.model}; {kind}: {plan.num_trainable:,} of {plan.num_parameters:,} parameters"),
            (
                "training data",
                f"{plan.corpus}; {privacy.num_records:,} records (the number counts as public)",
            ),
            ("validation data", plan.validation_note),
            ("unit of privacy", plan.unit),
            ("neighbouring data sets", NEIGHBOURS[privacy.relation]),
            ("epsilon", f"at most {rounded_up(privacy.epsilon)}{before}"),
            ("delta", f"{privacy.delta:g}{chosen}"),
            (
                "sampler",
                f"{SAMPLERS[privacy.sampler]} ({number(privacy.sampling_rate, 4)})".replace(
                    ", with the probability below", ""
                ),
            ),
            (
                "steps",
                f"{privacy.steps} of {privacy.batch_size} expected records; noise multiplier "
                f"{number(privacy.noise_multiplier, 4)}, clip norm {plan.clip_norm:g}, "
                f"{plan.optimizer} at learning rate {plan.learning_rate:g}",
            ),
            ("estimator", f"{plan.estimator}: {privacy.estimator.guarantee}"),
            ("accountant", privacy.accountant),
            *_audit(plan),
            ("ledger", str(plan.ledger)),
            ("out", str(plan.out)),
        ],
    )


def _audit(plan: RunPlan) -> list[tuple[str, str]]:
    if plan.audit is None:
        return []
    said = (
        f"{plan.audit.num} canaries ({plan.audit.kind}), each in by a secret fair coin; they cost no budget"
    )
    return [("audit", said)]


def _warnings(plan: RunPlan) -> list[str]:
    privacy, said = plan.privacy, []
    if plan.insecure_seed is not None:
        said.append(f"not private: the randomness comes from the public seed {plan.insecure_seed}")
    if privacy.noise_multiplier == 0:
        said.append("not private: no noise is added, and epsilon is infinite")
    if privacy.delta >= 1 / privacy.num_records:
        said.append(f"delta {privacy.delta:g} is not below 1 / number of records: choose a smaller one")
    return said


def _result(report: Report, result: FinetuneResult) -> Panel:
    rows = [
        ("epsilon", f"{rounded_up(report.epsilon, 3)} at delta {report.delta:g} ({report.epsilon_method})"),
        ("steps", f"{report.steps} in {report.seconds:.0f} s"),
    ]
    if report.loss_before is not None and report.loss_after is not None:
        told = f"{report.loss_before:.3f} before, {report.loss_after:.3f} after (nats per token)"
        rows.append(("validation loss", told))
    rows += [
        (report.saved_as, str(result.saved_as)),
        ("report", f"{result.out / 'report.md'} (also .html, .json, and curves.png)"),
        ("ledger", f"{report.ledger}: {report.ledger_charges} charges, head {report.ledger_head[:16]}..."),
    ]
    if report.insecure_seed is not None:
        rows.append(("warning", "not private: run with --insecure-seed"))
    return _table("What came out", rows)
