# SPDX-License-Identifier: Apache-2.0
"""The command that fine-tunes a language model, and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dpopt.cli import accounting
from dpopt.cli.failures import exit_codes
from dpopt.cli.record_options import record_form

_DATA, _PRIVACY, _TRAINING, _OUTPUT = "Data and model", "Privacy", "Training", "Output"


def finetune(
    model: Annotated[
        str | None,
        typer.Option(
            help="A name on the Hugging Face Hub or a local folder. (default: the embedded model)",
            rich_help_panel=_DATA,
        ),
    ] = None,
    train: Annotated[
        list[Path] | None,
        typer.Option(
            help="Training records: .jsonl, .csv or .txt; one record is the unit of privacy. May be repeated. "
            "(default: docstrings of installed packages)",
            rich_help_panel=_DATA,
        ),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option(help="Validation records, used only if declared public.", rich_help_panel=_DATA),
    ] = None,
    validation_is_public: Annotated[
        bool,
        typer.Option(
            "--validation-is-public",
            help="Declare the validation records public: their loss is shown and reported.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    text_field: Annotated[
        str | None,
        typer.Option(help="The field or column that holds the text. (default: text)", rich_help_panel=_DATA),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="The text made of several fields: '{mr} | {ref}'.", rich_help_panel=_DATA),
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            help="A prompt put before the text and left out of the loss: '{mr} |'.", rich_help_panel=_DATA
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Cut every record at so many tokens. (default: 128, or what the model takes)",
            rich_help_panel=_DATA,
        ),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="The budget, for everything on the ledger. (default: 8, without --noise-multiplier)",
            rich_help_panel=_PRIVACY,
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            help="The delta of the budget. (default: a power of ten below 1 / number of records)",
            rich_help_panel=_PRIVACY,
        ),
    ] = None,
    allow_large_delta: Annotated[
        bool,
        typer.Option(
            "--allow-large-delta",
            help="Accept a delta above 1 / number of records, within which publishing a record counts as private.",
            rich_help_panel=_PRIVACY,
        ),
    ] = False,
    clip_norm: Annotated[
        float, typer.Option(help="The norm to which each record's gradient is cut.", rich_help_panel=_PRIVACY)
    ] = 1.0,
    estimator: Annotated[
        str,
        typer.Option(
            help="flat, automatic, psac, per_layer, quantile, median, huber, two_threshold, ...; with numbers as in "
            "quantile:target=0.6,rate=0.1",
            rich_help_panel=_PRIVACY,
        ),
    ] = "flat",
    noise_multiplier: Annotated[
        float | None,
        typer.Option(
            help="Noise / clip norm. 0 is not private. (default: computed from epsilon)",
            rich_help_panel=_PRIVACY,
        ),
    ] = None,
    accountant: Annotated[
        str | None,
        typer.Option(
            help=f"One of {accounting.NAMES}. (default: that of the ledger's last run, or pld)",
            rich_help_panel=_PRIVACY,
        ),
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="What one record is, in words, for the report.", rich_help_panel=_PRIVACY),
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(
            help="The privacy ledger; one that exists is continued. (default: in --out)",
            rich_help_panel=_PRIVACY,
        ),
    ] = None,
    sampler: Annotated[
        str,
        typer.Option(
            help="poisson, truncated-poisson, balls-in-bins, shuffled, cyclic or fixed-size.",
            rich_help_panel=_PRIVACY,
        ),
    ] = "poisson",
    relation: Annotated[
        str,
        typer.Option(
            help="Neighbours: add-or-remove-one, zero-out-one or replace-one.", rich_help_panel=_PRIVACY
        ),
    ] = "add-or-remove-one",
    secure: Annotated[
        bool,
        typer.Option("--secure", help="Batches and noise from a cipher, exactly.", rich_help_panel=_PRIVACY),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on as the ledger's last run did, with its noise; refused if anything else changed.",
            rich_help_panel=_PRIVACY,
        ),
    ] = False,
    insecure_seed: Annotated[
        int | None,
        typer.Option(
            help="Repeatable noise and sampling, for tests only: NOT private.", rich_help_panel=_PRIVACY
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, or else --epochs.", rich_help_panel=_TRAINING)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Expected passes over the data. (default: 3; about 1 for the embedded records)",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Expected records a step. (default: 256, at most 1/8 of the records; 512 for the embedded ones)",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    physical_batch_size: Annotated[
        int,
        typer.Option(
            help="Records in memory at a time; it changes no result and no claim.", rich_help_panel=_TRAINING
        ),
    ] = 32,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate, falling linearly to 0. (default: 0.001; 0.005 with LoRA; 0.004 for the embedded records)",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            help="adamw, adam-bc (its second moment without the noise) or sgd (with momentum).",
            rich_help_panel=_TRAINING,
        ),
    ] = "adamw",
    averaging: Annotated[
        float | None,
        typer.Option(
            help="Evaluate and save the moving average of the weights, with this decay. (default: none)",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    lora_rank: Annotated[
        int, typer.Option(help="Rank of LoRA adapters; 0 trains all weights.", rich_help_panel=_TRAINING)
    ] = 0,
    eval_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between two looks at public validation data. (default: a sixth of the run)",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(help="For adapter and dropout; never for noise or sampling.", rich_help_panel=_TRAINING),
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.", rich_help_panel=_TRAINING)] = "auto",
    audit: Annotated[
        str | None,
        typer.Option(
            help="Made-up records among the others, whose traces dpopt audit looks for: canaries=1000, or "
            "canaries=500,kind=new-tokens (random-tokens, high-temperature).",
            rich_help_panel=_PRIVACY,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder for model, report and ledger. (default: the first free runs/finetune-NNNN)",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace model and report of an earlier run in --out; its ledger is continued.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
) -> None:
    """Fine-tune a language model so that its weights are differentially private in each training record.

    Without options: the embedded model on docstrings of installed packages, offline, in a few minutes.
    """
    errors = Console(stderr=True)
    with exit_codes(errors):
        from dpopt.cli.screen import Screen
        from dpopt.finetune import FinetuneConfig
        from dpopt.finetune import finetune as run

        config = FinetuneConfig(
            model=model,
            train=tuple(train or ()),
            validation=tuple(validation or ()),
            validation_is_public=validation_is_public,
            form=record_form(text_field, template, prompt_template),
            unit=unit,
            epsilon=epsilon,
            delta=delta,
            allow_large_delta=allow_large_delta,
            noise_multiplier=noise_multiplier,
            accountant=accountant,
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            physical_batch_size=physical_batch_size,
            learning_rate=lr,
            optimizer=optimizer,
            averaging=averaging,
            lora_rank=lora_rank,
            clip_norm=clip_norm,
            estimator=estimator,
            max_tokens=max_tokens,
            eval_every=eval_every,
            seed=seed,
            sampler=sampler,
            relation=relation,
            secure=secure,
            resume=resume,
            insecure_seed=insecure_seed,
            out=out,
            ledger=ledger,
            overwrite=overwrite,
            device=device,
            audit=audit,
        )
        with Screen(Console(), errors) as screen:
            result = run(config, listener=screen)
        screen.finished(result)
