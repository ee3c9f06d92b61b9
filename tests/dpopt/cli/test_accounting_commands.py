# SPDX-License-Identifier: Apache-2.0
"""The commands that price: tables by accountant, one number, a ledger, a picture, and refusals."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from accountants import FixedSize, Gaussian, Ledger, PoissonSampled, Repeated, accountant, calibrate
from accountants.registry import ACCOUNTANTS
from dpopt.cli.accounting import upwards
from dpopt.cli.commands import app

STEP = PoissonSampled(0.01, Gaussian(1.0))
PLAN = ["--noise-multiplier", 1, "--sampling-rate", 0.01, "--steps", 200, "--delta", 1e-5]


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, unit="one record", relation="add-or-remove-one") as book:
        for _ in range(5):
            book.charge(STEP)
        book.charge(Repeated(Gaussian(20.0), 2))
        book.charge(STEP)
    return path


def priced(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"│ (\w+) +│ ([\d.]+) ", text)}


def test_a_plan_is_priced_by_every_accountant_from_above() -> None:
    done = invoke("epsilon", *PLAN)
    assert done.exit_code == 0, done.output
    found = priced(done.stdout)
    assert set(found) == set(ACCOUNTANTS)
    for name, value in found.items():
        bound = accountant(name).curve(Repeated(STEP, 200)).epsilon(1e-5)
        assert bound <= value <= bound + 1.1e-4
    assert "adding or removing one record" in done.stdout


def test_one_accountant_prints_one_number() -> None:
    done = invoke("epsilon", *PLAN, "--accountant", "pld")
    assert float(done.stdout) == pytest.approx(
        accountant("pld").curve(Repeated(STEP, 200)).epsilon(1e-5), abs=1e-4
    )


def test_a_ledger_is_priced_over_all_its_charges(ledger: Path, tmp_path: Path) -> None:
    done = invoke("epsilon", "--ledger", ledger, "--delta", 1e-5, "--accountant", "rdp")
    curve = accountant("rdp").curve
    expected = (curve(STEP) * 6 + curve(Gaussian(20.0)) * 2).epsilon(1e-5)
    assert float(done.stdout) == pytest.approx(expected, abs=1e-4)
    picture = tmp_path / "epsilon.png"
    done = invoke("epsilon", "--ledger", ledger, "--delta", 1e-5, "--plot", picture)
    assert done.exit_code == 0, done.output
    assert "7 charges" in " ".join(done.stdout.split())  # the path may be long
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_a_plan_without_noise_has_a_picture_too(tmp_path: Path) -> None:
    plan = ["--noise-multiplier", 0, "--sampling-rate", 0.1, "--steps", 5, "--delta", 1e-5]
    done = invoke("epsilon", *plan, "--plot", tmp_path / "epsilon.png")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("infinity") == len(ACCOUNTANTS)
    assert (tmp_path / "epsilon.png").stat().st_size > 5000


@pytest.mark.parametrize("missing", ["noise-multiplier", "sampling-rate", "steps"])
def test_calibrate_solves_for_what_is_missing(missing: str) -> None:
    given = {"noise-multiplier": 1.0, "sampling-rate": 0.01, "steps": 200}
    del given[missing]
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    budget = ["--epsilon", 1, "--delta", 1e-5]
    done = invoke("calibrate", *budget, *options)
    # zcdp takes no account of the rate: none fits
    assert done.exit_code == (3 if missing == "sampling-rate" else 0), done.output
    assert "zcdp takes no account of sampling" in done.stdout
    assert all(name in done.stdout for name in ACCOUNTANTS)
    assert missing.replace("-", " ") in done.stdout
    found = float(invoke("calibrate", *budget, *options, "--accountant", "rdp").stdout)
    known = {name.replace("-", "_"): value for name, value in given.items()} | {
        missing.replace("-", "_"): found
    }
    price = calibrate.epsilon(
        noise_multiplier=known["noise_multiplier"],
        sampling_rate=known["sampling_rate"],
        steps=int(known["steps"]),
        delta=1e-5,
        accountant="rdp",
    )
    assert 0.97 < price <= 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["epsilon", "--delta", 1e-5], "must be given, or --ledger; got less; add the others"),
        (["epsilon", *PLAN, "--ledger", "x"], "a ledger or a plan must be given; got both"),
        (["epsilon", *PLAN[:-1], 2], "delta must be a number in"),
        (
            ["epsilon", *PLAN, "--plot", "/nowhere/x.png"],
            "a picture must go into a folder that is there; got /nowhere",
        ),
        (["epsilon", *PLAN, "--plot", "/"], "a picture must go to a file; got the folder or named pipe /;"),
        (["epsilon", *PLAN, "--accountant", "gdp"], "accountant must be one of"),
        (["calibrate", "--epsilon", 1, "--delta", 1e-5], "got 0; leave out the one to solve for"),
        (["calibrate", "--epsilon", 1, *PLAN], "got 3; leave out the one to solve for"),
    ],
)
def test_refusals(words: list[object], told: str) -> None:
    done = invoke(*words)
    assert done.exit_code == 2
    assert told in re.sub(r"\s+", " ", done.stderr)


@pytest.mark.parametrize("command", ["epsilon", "calibrate", "noise-multiplier", "finetune"])
def test_help_names_every_accountant(command: str) -> None:
    shown = re.sub(r"[\s│]+", " ", invoke(command, "--help").stdout)
    assert ", ".join(sorted(ACCOUNTANTS)) in shown


def test_a_missing_ledger_is_a_storage_failure(tmp_path: Path) -> None:
    assert invoke("epsilon", "--ledger", tmp_path / "none", "--delta", 1e-5).exit_code == 4


def test_small_numbers_keep_their_digits_and_never_fall() -> None:
    words = ["calibrate", "--epsilon", 1e-6, "--delta", 1e-5, "--steps", 100, "--sampling-rate", 0.01]
    shown = re.findall(r"│ pld +│ ([\d.]+) +│ ([\d.e-]+)", invoke(*words).stdout)
    assert 0 < float(shown[0][1]) <= 1e-6
    for value in (1e-14, 9.9999e-4, 1.23456789e-7, 0.5, 0.0):
        assert value <= float(upwards(value)) <= value * 1.001 + (1e-4 if value >= 1e-3 else 0)


def test_no_step_that_fits_is_explained() -> None:
    done = invoke(
        "calibrate", "--epsilon", 3, "--delta", 1e-5, "--noise-multiplier", 0, "--sampling-rate", 0.01
    )
    assert done.exit_code == 0
    assert done.stdout.count("not one step fits the budget; add noise") == len(ACCOUNTANTS)


def test_many_runs_that_fit_and_too_many() -> None:
    words = [
        "calibrate",
        "--epsilon",
        3,
        "--delta",
        1e-5,
        "--noise-multiplier",
        1000,
        "--sampling-rate",
        1e-6,
    ]
    assert float(invoke(*words, "--accountant", "pld").stdout) > 1e15
    done = invoke(*words[:6], 1e9, *words[7:], "--accountant", "pld")
    assert done.exit_code == 2
    assert "of which 10^18 runs fit" in re.sub(r"\s+", " ", done.stderr)


def test_a_mechanism_without_a_price_fails_the_table(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(path, unit="one record", relation="add-or-remove-one") as book:
        book.charge(FixedSize(10, 100, Gaussian(1.0)))
    done = invoke("epsilon", "--ledger", path, "--delta", 1e-5)
    assert done.exit_code == 2
    assert "its rate changes with the number of records" in re.sub(r"[\s│]+", " ", done.stdout)
