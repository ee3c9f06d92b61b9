# SPDX-License-Identifier: Apache-2.0
"""`dpopt audit attack`, `shadow`, `secrets` and `extract`: what outsiders can learn from a saved language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dpopt.cli.failures import exit_codes

if TYPE_CHECKING:
    from dpopt.attacks.battery import AttackReport
    from dpopt.attacks.signals import Seen

_DATA, _TRAINING = "Data and models", "Training"

Model = Annotated[
    str, typer.Argument(help="A saved model, an adapter, the folder of a run, or a name on the Hub.")
]
TextField = Annotated[str | None, typer.Option(help="As for finetune.", rich_help_panel=_DATA)]
MaxTokens = Annotated[
    int | None, typer.Option(help="Cut every record at so many tokens, as the training did. (default: 128)")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]


def attack(
    model: Model,
    members: Annotated[
        list[Path], typer.Option(help="Records that took part: .jsonl, .csv or .txt.", rich_help_panel=_DATA)
    ],
    non_members: Annotated[
        list[Path], typer.Option(help="Records that did not, drawn like them.", rich_help_panel=_DATA)
    ],
    reference: Annotated[
        list[str] | None,
        typer.Option(help="A model that saw neither, e.g. the base model.", rich_help_panel=_DATA),
    ] = None,
    shadows: Annotated[
        Path | None, typer.Option(help="A folder of `dpopt audit shadow`.", rich_help_panel=_DATA)
    ] = None,
    text_field: TextField = None,
    template: TextField = None,
    prompt_template: TextField = None,
    max_tokens: MaxTokens = None,
    confidence: Annotated[float, typer.Option(help="Of intervals, and of all lower bounds together.")] = 0.95,
    delta: Annotated[float, typer.Option(help="At which epsilon is bounded.")] = 1e-5,
    gaussian: Annotated[
        bool,
        typer.Option(
            "--gaussian", help="Bound epsilon as of a training that leaks no more than one Gaussian release."
        ),
    ] = False,
    device: Device = "auto",
    cache: Annotated[
        Path | None, typer.Option(help="A folder that keeps what the models say of the records.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for attacks.html, attacks.json and roc.png.")] = Path(
        "audit-attack"
    ),
) -> None:
    """Tell members from non-members by what a language model says of them, in every way that the inputs allow.

    Loss and Min-K%++ need the model alone; calibrated loss, RMIA and InfoRMIA a reference; LiRA shadow models.
    """
    errors = Console(stderr=True)
    with exit_codes(errors):
        from dpopt.atomic_files import write_file
        from dpopt.attacks import report as attack_report
        from dpopt.attacks.files import AttackFiles, attack_files
        from dpopt.cli.record_options import record_form

        files = AttackFiles(
            model=model,
            members=members,
            non_members=non_members,
            references=tuple(reference or ()),
            shadows=shadows,
            form=record_form(text_field, template, prompt_template),
            max_tokens=max_tokens,
            confidence=confidence,
            delta=delta,
            gaussian=gaussian,
            device=_device(device),
            cache=cache,
        )
        report = attack_files(files, lambda what, total: _bar(errors, what, total))
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "attacks.json", attack_report.to_json(report).encode())
        write_file(out / "roc.png", attack_report.picture(report))
        write_file(out / "attacks.html", attack_report.to_html(report).encode())
        _show_attacks(Console(), errors, report, out)


def shadow(
    model: Annotated[
        str, typer.Option(help="What the attacked model was trained from.", rich_help_panel=_DATA)
    ],
    pool: Annotated[
        list[Path],
        typer.Option(help="Members and non-members together, a file or several.", rich_help_panel=_DATA),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the shadow models; one that was begun goes on.")],
    num_models: Annotated[int, typer.Option(help="Even; each record is in half of them.")] = 8,
    text_field: TextField = None,
    template: TextField = None,
    prompt_template: TextField = None,
    max_tokens: MaxTokens = None,
    epochs: Annotated[float, typer.Option(help="Passes over a half.", rich_help_panel=_TRAINING)] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Expected records a step.", rich_help_panel=_TRAINING)] = 64,
    lr: Annotated[float, typer.Option(help="Falling linearly to 0.", rich_help_panel=_TRAINING)] = 1e-3,
    clip_norm: Annotated[
        float | None,
        typer.Option(help="Clip each record's gradient, as a private run does.", rich_help_panel=_TRAINING),
    ] = None,
    noise_multiplier: Annotated[
        float, typer.Option(help="Noise / clip norm, as a private run has it.", rich_help_panel=_TRAINING)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of coins and training.")] = 0,
    device: Device = "auto",
) -> None:
    """Train the model under attack again, on random halves of a pool of records: what LiRA compares with.

    Killed and started again, it trains what is missing. The models know the records: keep the folder to yourself.
    """
    errors = Console(stderr=True)
    with exit_codes(errors):
        from dpopt.attacks.shadow_files import ShadowFiles, train_shadow_files
        from dpopt.cli.record_options import record_form

        files = ShadowFiles(
            model=model,
            pool=pool,
            out=out,
            num_models=num_models,
            form=record_form(text_field, template, prompt_template),
            max_tokens=max_tokens,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=lr,
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            seed=seed,
            device=_device(device),
        )
        with _bar(errors, "shadow models", num_models) as seen:
            train_shadow_files(files, lambda number: seen(1))
        Console().print(f"{num_models} shadow models in [bold]{escape(str(out))}[/]", highlight=False)


def secrets(
    prefix: Annotated[list[str], typer.Option(help="Text before a secret: 'The code of Ann is'.")],
    out: Annotated[Path, typer.Option(help="The file of canaries, for `dpopt audit extract`.")],
    records: Annotated[
        Path, typer.Option(help="The file of records to train on beside the others (.jsonl).")
    ],
    length: Annotated[int, typer.Option(help="Symbols of a secret.")] = 4,
    alphabet: Annotated[str, typer.Option(help="What a symbol is drawn from.")] = "0123456789",
    separator: Annotated[str, typer.Option(help="Put before each symbol.")] = " ",
    times: Annotated[
        list[int] | None,
        typer.Option(help="In how many records a secret is put; each makes one secret. (default: 0 1 10)"),
    ] = None,
) -> None:
    """Draw secrets to be put among training records, so that their exposure can be measured afterwards."""
    with exit_codes(Console(stderr=True)):
        from dpopt.attacks.canaries import SecretFormat, draw_secrets, write_records, write_secrets

        forms = [SecretFormat(text, length, tuple(alphabet), separator) for text in prefix]
        drawn = draw_secrets(forms, times or [0, 1, 10])
        write_secrets(out, drawn)
        number = write_records(records, drawn)
        Console().print(
            f"{len(drawn)} secrets in [bold]{escape(str(out))}[/], {number} records to train on in "
            f"[bold]{escape(str(records))}[/]: add the file by --train",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def extract(
    model: Model,
    secrets: Annotated[
        Path | None, typer.Option(help="A file of `dpopt audit secrets`.", rich_help_panel=_DATA)
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(help="Training records that the model may complete by itself.", rich_help_panel=_DATA),
    ] = None,
    prefix_tokens: Annotated[
        list[int] | None, typer.Option(help="How much of a record is given. (default: 4 8 16 32)")
    ] = None,
    text_field: TextField = None,
    template: TextField = None,
    prompt_template: TextField = None,
    max_tokens: MaxTokens = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="The folder for extraction.json.")] = Path("audit-extract"),
) -> None:
    """Measure the exposure of inserted secrets, and how many records the model completes word for word."""
    errors = Console(stderr=True)
    with exit_codes(errors):
        from dpopt.atomic_files import write_file
        from dpopt.attacks.extraction_files import ExtractFiles, extract_files, to_json
        from dpopt.cli.record_options import record_form

        files = ExtractFiles(
            model=model,
            secrets=secrets,
            records=tuple(records or ()),
            prefixes=tuple(prefix_tokens or (4, 8, 16, 32)),
            form=record_form(text_field, template, prompt_template),
            max_tokens=max_tokens,
            device=_device(device),
        )
        report = extract_files(files, lambda what, total: _bar(errors, what, total))
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / "extraction.json", to_json(report).encode())
        console = Console()
        if report.exposures:
            table = Table(
                "inserted",
                "secrets",
                "mean exposure",
                "largest",
                "most there is",
                "rank 1",
                title="Exposure, bits",
            )
            for row in report.exposure_rows():
                table.add_row(*row)
            console.print(table)
        if report.completions:
            table = Table("prefix, tokens", "completed word for word", "95 % interval", title="Extraction")
            for tokens, found in report.completions.items():
                ends = f"{100 * found.low:.2f} - {100 * found.high:.2f} %"
                table.add_row(str(tokens), f"{100 * found.value:.2f} %", ends)
            console.print(table)
        console.print(f"Written: {escape(str(out / 'extraction.json'))}", highlight=False)


def register(app: typer.Typer) -> None:
    """Add these commands to `dpopt audit`."""
    for command in (attack, shadow, secrets, extract):
        app.command()(command)


def _show_attacks(console: Console, errors: Console, report: AttackReport, out: Path) -> None:
    from dpopt.attacks.report import heads, rows, warnings

    table = Table(
        *heads(report), title=f"{int(report.member.sum())} members, {int((~report.member).sum())} non-members"
    )
    for row in rows(report):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"Intervals at {100 * report.confidence:g} %. The lower bounds hold together, if each record was a member by its "
        "own fair coin. An AUC near 0.5 is no guarantee.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for warning in warnings(report):
        errors.print(f"[bold yellow]warning:[/] {escape(warning)}", soft_wrap=True, highlight=False)
    console.print(f"Written: {escape(str(out / 'attacks.html'))}, attacks.json, roc.png", highlight=False)


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Seen]:
    if not console.is_terminal:
        console.print(f"dpopt: {what} ...", highlight=False)
        yield lambda more: None
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda more: progress.advance(task, more)


def _device(name: str):
    from dpopt.finetune.language_model import device_called

    return device_called(name)
