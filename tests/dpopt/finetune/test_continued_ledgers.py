# SPDX-License-Identifier: Apache-2.0
"""Runs that go on with a ledger: the one that the folder's report knows, of this relation, and without a filter."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from accountants import REPLACE, Gaussian, Ledger, PoissonSampled, Repeated, budget_filter, read
from dpopt.cli.commands import app
from dpopt.finetune import InputError, finetune

LEDGER = "privacy.ledger.jsonl"
GONE = r"expected the ledger with the head [0-9a-f]{64}, .*report.json states after \d+ charges; got .*put the newest copy back"


def charges(ledger: Path) -> int:
    return sum(record.kind == "charge" for record in read(ledger).records)


@pytest.fixture
def again(config):
    """Two runs of four charges each in one folder, the ledger between them, and how to run a third time."""
    options = {"epsilon": None, "noise_multiplier": 1.0, "overwrite": True}
    out = finetune(config(**options)).out
    between = out.parent / "between.jsonl"
    shutil.copy(out / LEDGER, between)
    finetune(config(**options))
    return out, between, lambda **more: finetune(config(**{**options, **more}))


def test_a_ledger_behind_the_head_of_the_report_is_refused(again) -> None:
    out, between, run = again
    newest, report = (out / LEDGER).read_bytes(), (out / "report.json").read_bytes()
    shutil.copy(between, out / LEDGER)
    for more in ({}, {"resume": True, "noise_multiplier": None, "epsilon": 90.0}, {"ledger": out / LEDGER}):
        with pytest.raises(InputError, match=GONE):
            run(**more)
    lines = newest.splitlines(keepends=True)
    (out / LEDGER).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(InputError, match=GONE):
        run()
    (out / LEDGER).unlink()
    with pytest.raises(InputError, match="got none there"):
        run()
    assert (out / "report.json").read_bytes() == report
    (out / LEDGER).write_bytes(newest)  # the remedy
    assert run().report.ledger_charges == charges(out / LEDGER) == 12


def test_a_new_ledger_in_place_of_the_reported_one_is_refused(again) -> None:
    out, _, run = again
    unit = read(out / LEDGER).unit
    (out / LEDGER).unlink()
    Ledger.open(out / LEDGER, unit=unit).close()
    with pytest.raises(InputError, match=GONE):
        run()


def test_a_folder_that_was_moved_keeps_its_ledger(again) -> None:
    out, between, run = again
    moved = out.with_name("moved")
    out.rename(moved)
    shutil.copy(between, moved / "kept.jsonl")
    newest = (moved / LEDGER).read_bytes()
    shutil.copy(between, moved / LEDGER)
    with pytest.raises(InputError, match=GONE):
        run(out=moved)
    (moved / LEDGER).write_bytes(newest)
    assert run(out=moved).report.ledger_charges == 12


def test_a_ledger_named_on_purpose_is_none_of_the_reports_concern(again, tmp_path: Path) -> None:
    _, between, run = again
    assert run(ledger=tmp_path / "fresh.jsonl").report.ledger_charges == 4
    # now the report states the head of that one, and its own old ledger is not it
    with pytest.raises(InputError, match="name the ledger with --ledger"):
        run()
    assert run(ledger=tmp_path / "fresh.jsonl").report.ledger_charges == 8
    with pytest.raises(InputError, match=GONE):
        shutil.copy(between, tmp_path / "fresh.jsonl")
        run(ledger=tmp_path / "fresh.jsonl")


def test_an_unreadable_report_is_told(again) -> None:
    out, _, run = again
    (out / "report.json").write_text("{half")
    with pytest.raises(
        InputError, match=r"which states the head of its ledger; got something unreadable .*move it away"
    ):
        run()
    (out / "report.json").unlink()  # the remedy
    assert run().report.ledger_charges == 12
    assert json.loads((out / "report.json").read_text())["ledger_charges"] == 12


def test_ledgers_of_another_relation_or_with_a_filter_are_refused_before_the_model_is_used(
    config, tmp_path
) -> None:
    with Ledger.open(tmp_path / "replace", relation=REPLACE) as ledger:
        ledger.charge(Gaussian(9.0))
    with pytest.raises(
        InputError, match=r"whose relation is replace-one; pass --relation replace-one, or another"
    ):
        finetune(config(ledger=tmp_path / "replace"))
    with Ledger.open(tmp_path / "governed") as ledger:
        budget_filter(2.0, 1e-5, planned=Repeated(PoissonSampled(0.1, Gaussian(1.0)), 9), ledger=ledger)
    with pytest.raises(
        InputError, match=r"which a filter of epsilon 2 at delta 1e-05 governs; pass another --ledger"
    ):
        finetune(config(ledger=tmp_path / "governed"))


def test_the_head_is_printed_with_the_command_that_asks_for_it(
    config, tmp_path: Path, tiny_model: Path
) -> None:
    made, out = config(), tmp_path / "printed"
    words = [
        "finetune",
        "--model",
        tiny_model,
        "--train",
        made.train[0],
        "--noise-multiplier",
        1,
        "--steps",
        2,
    ]
    words += ["--batch-size", made.batch_size, "--out", out, "--accountant", "rdp"]
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    anchor = next(line for line in done.stdout.splitlines() if "dpopt ledger verify" in line)
    asked = anchor.partition("dpopt ledger verify ")[2].split()
    verified = CliRunner().invoke(app, ["ledger", "verify", *asked])
    assert verified.exit_code == 0 and "0 charges were made since" in verified.stdout
