# SPDX-License-Identifier: Apache-2.0
"""`dpopt audit step` and the pytest fixture: the way in for somebody else's step."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpopt.cli.commands import app

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
MODULE = """
import sys
sys.path.insert(0, {folder!r})
from tests.support.dpopt.private_steps import private_step

right = private_step()
def halved():
    return private_step("halved")
def silent():
    def make(records, noise_multiplier):
        import torch
        model = torch.nn.Linear(2, 2)
        return model, lambda batch: None
    from dpopt.audit.step_checks import TrainingStep
    return TrainingStep(make, [0, 1, 2, 3], 1.0)
number = 3
def broken():
    def make(records, noise_multiplier):
        raise RuntimeError("no such layer")
    from dpopt.audit.step_checks import TrainingStep
    return TrainingStep(make, [0, 1, 2, 3], 1.0)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "some_steps", raising=False)
    (tmp_path / "some_steps.py").write_text(MODULE.format(folder=str(HERE)))
    yield "some_steps"
    sys.modules.pop("some_steps", None)


def ask(*words):
    return CliRunner().invoke(app, ["audit", "step", *words], env={"COLUMNS": "200"})


def test_exit_codes_tell_what_was_found(module, tmp_path):
    done = ask(f"{module}:right", "--only", "noise", "--only", "state", "--json", "found.json")
    assert done.exit_code == 0, done.output
    assert "No fault was found" in done.output and "noise scale" in done.output
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert {f["verdict"] for f in found} == {"holds"} and len(found) > 6
    done = ask(f"{module}:halved", "--only", "noise")
    assert done.exit_code == 1
    assert "does not keep its claim: noise scale" in done.output and "sample_noise(step" in done.output
    assert ask(f"{module}:silent", "--only", "noise").exit_code == 3


@pytest.mark.parametrize(
    "target, words",
    [
        ("some_steps", "MODULE:NAME"),
        ("no_such:step", "can be imported"),
        ("some_steps:number", "a TrainingStep"),
    ],
)
def test_what_is_no_step_is_refused_with_the_way(module, target, words):
    done = ask(target)
    assert done.exit_code == 2 and words in done.output


def plugin():
    installed = [e for e in entry_points(group="pytest11") if e.value == "dpopt_pytest"]
    return [] if installed else ["-p", "dpopt_pytest"]


def test_the_fixture_passes_a_right_step_and_fails_a_wrong_one(pytester):
    pytester.makepyfile(
        f"""
        import sys
        sys.path.insert(0, {str(HERE)!r})
        from tests.support.dpopt.private_steps import private_step

        def test_right(check_private_step):
            report = check_private_step(private_step(), checks=("noise",))
            assert report.exit_code == 0

        def test_wrong(check_private_step):
            check_private_step(private_step("halved"), checks=("noise",))

        def test_known(check_private_step):
            check_private_step(private_step("halved"), checks=("noise",), allow=("noise scale",))
        """
    )
    result = pytester.runpytest_inprocess(*plugin(), "-q", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*fault: noise scale: expected standard deviation*"])


def test_the_plug_in_loads_nothing_until_it_is_used():
    code = "import dpopt_pytest, sys; print({'torch', 'dpopt', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parents[2], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_the_plug_in_is_declared():
    import tomllib

    project = tomllib.loads((HERE.parents[2] / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"dpopt": "dpopt_pytest"}
    assert project["tool"]["setuptools"]["py-modules"] == ["dpopt_pytest"]
