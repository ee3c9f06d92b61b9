# SPDX-License-Identifier: Apache-2.0
"""The commands on ledgers of every relation, on ledgers that a filter governs, on pipes, and on what takes long."""

import json
import os
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from accountants import (
    ADD_REMOVE,
    REPLACE,
    ZERO_OUT,
    BudgetExhausted,
    FixedSize,
    Gaussian,
    Ledger,
    PoissonSampled,
    Repeated,
    accountant,
    best,
    budget_filter,
    read,
    to_dict,
)
from accountants.records import following, to_line
from dpopt.cli import reading
from dpopt.cli.commands import app

STEP = PoissonSampled(0.01, Gaussian(1.0))


def invoke(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture
def governed(tmp_path: Path) -> Path:
    path = tmp_path / "governed.jsonl"
    with Ledger.open(path) as ledger:
        budget = budget_filter(2.0, 1e-5, planned=Repeated(STEP, 1000), ledger=ledger)
        with pytest.raises(BudgetExhausted):
            for number in range(200):
                budget.spend(Repeated(PoissonSampled(0.01, Gaussian((0.8, 1.0, 2.0)[number % 3])), 20))
    return path


@pytest.mark.parametrize("event", [STEP, FixedSize(10, 1000, Gaussian(1.0)), Gaussian(5.0)])
@pytest.mark.parametrize("relation", [ADD_REMOVE, ZERO_OUT, REPLACE])
def test_a_ledger_is_priced_under_the_relation_of_its_header(tmp_path: Path, relation: str, event) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, relation=relation) as ledger:
        for _ in range(30):
            ledger.charge(event)
    done = invoke("epsilon", "--ledger", path, "--delta", 1e-5, "--accountant", "pld")
    status = invoke("ledger", "status", path, "--delta", 1e-5)
    if relation == ADD_REMOVE and isinstance(event, FixedSize):
        assert (done.exit_code, status.exit_code) == (2, 2)
        assert "under add-or-remove-one" in done.stderr
        return
    truth = accountant("pld", relation).curve(Repeated(event, 30)).epsilon(1e-5)
    assert truth <= float(done.stdout) <= truth + 1.1e-4
    told = re.search(r"epsilon +│ ([\d.]+) at delta", status.stdout)
    least = best(Repeated(event, 30), 1e-5, relation=relation).epsilon
    assert told is not None and least <= float(told[1]) <= least + 1.1e-4
    table = invoke("epsilon", "--ledger", path, "--delta", 1e-5)
    assert f"│ {done.stdout.strip()} " in table.stdout
    words = {ADD_REMOVE: "adding or removing", ZERO_OUT: "emptying", REPLACE: "replacing"}
    assert words[relation] in table.stdout
    assert not any(others in table.stdout for name, others in words.items() if name != relation)


def test_a_governed_ledger_is_worth_its_filter_in_every_command(governed: Path) -> None:
    happened = best(read(governed).events(), 1e-5).epsilon
    assert happened < 1.95
    status = invoke("ledger", "status", governed, "--delta", 1e-5)
    assert status.exit_code == 0, status.output
    assert "2.0000 at delta 1e-05 (renyi filter" in status.stdout
    assert re.search(
        r"filter +│ epsilon 2 at delta 1e-05, renyi filter, one order of [\d.]+; [\d.]+ % left", status.stdout
    )
    assert "may depend on the released outputs" in status.stdout
    priced = invoke("epsilon", "--ledger", governed, "--delta", 1e-5)
    assert priced.exit_code == 0 and priced.stdout.startswith("2.0000 (renyi filter")
    for told in (status.stdout, priced.stdout):
        assert f"{happened:.2f}" not in told and "were fixed before" not in told
    lower = invoke("epsilon", "--ledger", governed, "--delta", 1e-6)
    assert 2.0 < float(lower.stdout.split()[0]) < 2.5
    assert json.loads(invoke("ledger", "export", governed).stdout)["filter"]["epsilon"] == 2.0


def test_a_governed_ledger_has_no_price_of_a_schedule(governed: Path, tmp_path: Path) -> None:
    for name in ("pld", "prv", "rdp", "zcdp"):
        done = invoke("epsilon", "--ledger", governed, "--delta", 1e-5, "--accountant", name)
        assert done.exit_code == 2 and done.stdout == ""
        assert "by the filter that governs it, epsilon 2 at delta 1e-05" in done.stderr
        assert "leave it out" in done.stderr
    done = invoke("epsilon", "--ledger", governed, "--delta", 1e-5, "--plot", tmp_path / "x.png")
    assert done.exit_code == 2 and "leave --plot out" in done.stderr
    assert not (tmp_path / "x.png").exists()


def test_an_overrun_filter_is_told_as_such(governed: Path) -> None:
    last = read(governed).records[-1]
    with governed.open("ab") as file:
        file.write(
            to_line(following(last, "charge", {"event": to_dict(Repeated(STEP, 5000)), "context": {}}))
        )
    status = invoke("ledger", "status", governed, "--delta", 1e-5)
    assert "OVERRUN, it guarantees nothing" in status.stdout
    assert "infinity at delta 1e-05 (filter overrun)" in status.stdout


def test_the_whole_head_is_printed_and_found_again(governed: Path) -> None:
    head = read(governed).records[-1].hash
    narrow = CliRunner().invoke(app, ["ledger", "status", str(governed)], env={"COLUMNS": "70"})
    assert head in "".join(re.findall(r"[0-9a-f]{8,}", narrow.stdout))
    with Ledger.open(governed) as ledger:
        ledger.charge(Gaussian(1000.0))
        ledger.note("a remark")
        ledger.charge(Gaussian(1000.0))
    done = invoke("ledger", "verify", governed, "--head", head)
    assert done.exit_code == 0
    assert "3 records ago; 2 charges were made since" in done.stdout
    for unknown in (head[:-1], head[::-1], ""):
        done = invoke("ledger", "verify", governed, "--head", unknown)
        assert done.exit_code == 1 and "must contain the head" in done.stderr


def test_no_command_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    pipe = tmp_path / "pipe"
    for words in (
        ["ledger", "verify", pipe],
        ["ledger", "status", pipe, "--delta", 1e-5],
        ["ledger", "export", pipe],
        ["epsilon", "--ledger", pipe, "--delta", 1e-5],
    ):
        done = invoke(*words)
        assert done.exit_code in (1, 4)
        assert "must be a file to be a ledger; got a named pipe; give the name of a file" in done.stderr
    plan = ["--noise-multiplier", 1, "--sampling-rate", 0.1, "--steps", 2, "--delta", 1e-5]
    done = invoke("epsilon", *plan, "--accountant", "rdp", "--plot", pipe)
    assert done.exit_code == 2 and "named pipe" in done.stderr


def test_what_cannot_be_read_is_told_in_three_parts(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("missing", "loop", "."):
        done = invoke("ledger", "verify", tmp_path / name)
        assert done.exit_code == 4
        assert re.search(r"expected a ledger that can be read; got .*: .*; name the file", done.stderr)


def test_what_takes_long_says_what_it_is(governed: Path, monkeypatch) -> None:
    quick = invoke("ledger", "verify", governed)
    assert quick.stderr == ""
    monkeypatch.setattr(reading, "PATIENCE", 0.0)
    slow = invoke("epsilon", "--ledger", governed, "--delta", 1e-5)
    assert re.search(r"dpopt: verifying .*governed.jsonl \.\.\.", slow.stderr)
    assert slow.exit_code == 0 and slow.stdout.startswith("2.0000")
    with reading.patience(Console(stderr=True, force_terminal=True), "working"):
        pass
    with pytest.raises(ZeroDivisionError), reading.patience(Console(stderr=True), "working"):
        raise ZeroDivisionError
