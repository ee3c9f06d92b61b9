# SPDX-License-Identifier: Apache-2.0
"""The command: what it prints, what it leaves behind, and the exit code of everything that goes wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from accountants import ADD_REMOVE, Gaussian, Ledger, PoissonSampled
from dpopt.cli.commands import app
from dpopt.finetune import saving


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def options(tiny_model: Path, train_file: Path, tmp_path: Path) -> list[object]:
    quick = ["--steps", 3, "--batch-size", 12, "--accountant", "rdp"]
    return ["finetune", "--model", tiny_model, "--train", train_file, "--out", tmp_path / "out", *quick]


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_a_run_says_what_it_claims_and_what_came_out(options, validation_file: Path, tmp_path: Path) -> None:
    done = invoke(*options, "--validation", validation_file, "--validation-is-public", "--eval-every", 1)
    assert done.exit_code == 0, done.output
    claim, _, outcome = flat(done.stdout).partition("What came out")
    for expected in (
        "What will be claimed",
        "one record of the training data",
        "adding or removing one record",
        "0.001 (chosen here, below 1 / number of records)",
        "Poisson",
        "privacy.ledger.jsonl",
        "declared public by whoever started the run",
    ):
        assert expected in claim
    assert "before, " in outcome
    assert "AutoModelForCausalLM.from_pretrained" in outcome
    assert re.search(r"\bloss \d", done.stderr)
    assert "3/3" in done.stderr
    assert (tmp_path / "out" / "report.html").is_file()


def test_no_loss_is_printed_unless_validation_is_public(options, validation_file: Path) -> None:
    done = invoke(*options, "--validation", validation_file)
    assert done.exit_code == 0, done.output
    assert "not used" in flat(done.stdout)
    assert "validation loss" not in done.stdout
    assert not re.search(r"\bloss \d", done.stderr)


def test_a_non_private_run_is_warned_of(options) -> None:
    done = invoke(
        *options, "--noise-multiplier", 0, "--insecure-seed", 1, "--delta", 0.1, "--allow-large-delta"
    )
    assert done.exit_code == 0, done.output
    assert "not private: no noise is added" in done.stderr
    assert "not private: the randomness comes from the public seed 1" in done.stderr
    assert "delta 0.1 is not below 1 / number of records" in done.stderr
    assert "infinity" in done.stdout


def test_the_command_runs_as_a_program(options, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dpopt.cli.app", *(str(option) for option in options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "What came out" in done.stdout
    assert "Warning" not in done.stderr
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"] == 3


def test_templates_reach_the_records(options, tmp_path: Path) -> None:
    rows = "".join(f"{i},text number {i}\n" for i in range(40))
    (tmp_path / "rows.csv").write_text("id,body\n" + rows)
    options = [tmp_path / "rows.csv" if str(o).endswith("train.jsonl") else o for o in options]
    assert invoke(*options, "--template", "{body}", "--prompt-template", "{id}:").exit_code == 0
    done = invoke(*options, "--text-field", "nothing", "--overwrite")
    assert done.exit_code == 2
    assert "expected the field 'nothing' in" in done.stderr


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["--train", "none.jsonl"], 2, "expected a file at none.jsonl; got none; check the path"),
        (["--model", "/nowhere/at/all"], 2, "expected a causal language model called '/nowhere/at/all'"),
        (["--epsilon", "inf"], 2, "expected a finite epsilon > 0; got inf"),
        (["--batch-size", "999"], 2, "expected a batch size of at most 60"),
        (["--text-field", "a", "--template", "{b}"], 2, "expected --text-field or --template; got both"),
        (["--estimator", "adaptive"], 2, "expected an estimator out of flat, automatic, psac, per_layer"),
        (["--estimator", "per_block"], 2, "of trainable blocks of one type; got none"),
        (["--epsilon", "1e-9"], 3, "expected a budget that leaves a signal"),
        (["--epsilon", "1", "--noise-multiplier", "0.1"], 3, "to fit epsilon 1 at delta 0.001; got epsilon"),
        (["--out", "/proc/nothing"], 4, "/proc/nothing"),
    ],
)
def test_errors_have_a_text_and_an_exit_code(
    options, tmp_path: Path, changes: list[str], code: int, message: str
) -> None:
    done = invoke(*options, *changes)
    assert done.exit_code == code, done.output
    assert message in flat(done.stderr)
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_refused(options) -> None:
    done = invoke(*options, "--epsilonn", 3)
    assert done.exit_code == 2
    assert "No such option" in done.stderr


def test_a_corrupt_or_locked_ledger_is_refused(options, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    unit = "one record of the training data"
    with Ledger.open(ledger, unit=unit, relation=ADD_REMOVE) as held:
        held.charge(PoissonSampled(0.2, Gaussian(2.0)))
        locked = invoke(*options, "--ledger", ledger)
    assert locked.exit_code == 4
    assert "the ledger must have one writer" in locked.stderr
    other = invoke(*options, "--ledger", ledger, "--unit", "one person")
    assert other.exit_code == 2
    assert "unit of" in other.stderr
    ledger.write_bytes(ledger.read_bytes().replace(b"2.0", b"9.0"))
    corrupt = invoke(*options, "--ledger", ledger)
    assert corrupt.exit_code == 4
    assert "must be an unbroken chain of records" in corrupt.stderr


def test_a_model_that_does_not_fit_is_rescued(
    options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save = saving.save

    def full(model, tokenizer, folder: Path) -> None:
        if folder.parent == tmp_path / "out":
            raise OSError(28, "No space left on device")
        save(model, tokenizer, folder)

    monkeypatch.setattr(saving, "save", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = invoke(*options)
    assert done.exit_code == 4
    assert "it was saved in" in flat(done.stderr)


def test_an_interrupted_run_says_what_it_left(options, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpopt.training import PrivateTraining

    release = PrivateTraining.release

    def interrupted(self: PrivateTraining) -> None:
        if self.steps == 1:
            raise KeyboardInterrupt
        release(self)

    monkeypatch.setattr(PrivateTraining, "release", interrupted)
    done = invoke(*options)
    assert done.exit_code == 130
    assert "what was charged stays on the ledger; the weights after 1 steps are in" in flat(done.stderr)


def test_version_help_and_prices() -> None:
    assert re.fullmatch(r"dpopt \d+\.\d+\.\d+\n", invoke("--version").stdout)
    shown = flat(invoke("finetune", "--help").stdout)
    for option in ("--epsilon", "--lora-rank", "--validation-is-public", "--physical-batch-size"):
        assert option in shown
    assert "(default: the embedded model)" in shown
    step = ["--sampling-rate", 0.01, "--steps", 1000, "--delta", 1e-5, "--accountant", "rdp"]
    price = invoke("epsilon", "--noise-multiplier", 1, *step)
    assert float(price.stdout) == pytest.approx(2.1, abs=0.05)
    noise = invoke("noise-multiplier", "--epsilon", price.stdout.strip(), *step)
    assert float(noise.stdout) == pytest.approx(1.0, abs=0.01)
    refused = invoke("epsilon", "--noise-multiplier", -1, *step)
    assert refused.exit_code == 2
    assert "noise_multiplier must be" in refused.stderr
