# SPDX-License-Identifier: Apache-2.0
"""Who notices a planted bug: the step checker, and the tests that are named. Each bug lives in a forked process."""

import contextlib
import io
import json
import os
import signal
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from dpopt.audit.step_checks import check_step
from tests.mutations.mutating import Mutation, planted
from tests.mutations.own_steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 400
_AREAS = {
    "noise present": "noise", "noise scale": "noise", "noise shape": "noise", "noise steady": "noise",
    "noise and batch": "noise", "sensitivity": "sensitivity", "sensitivity to noise": "sensitivity",
    "hostile records": "sensitivity", "steps independent": "independence", "tensors independent": "independence",
    "runs independent": "independence", "restart": "independence", "buffers": "state", "parameters": "state",
    "number of records": "state", "sampling rate": "sampler", "batch sizes": "sampler", "records": "sampler",
    "draws independent": "sampler",
}  # fmt: skip
"""Which part of the checker makes each finding."""


@dataclass
class Caught:
    """The findings of the step checker, and the tests that failed, first ones only."""

    checks: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    trouble: str = ""
    seconds: float = 0.0

    @property
    def any(self) -> bool:
        return bool(self.checks or self.tests)


def by_checker(mutation: Mutation, *, quick: bool = False) -> tuple[str, ...]:
    """The faults and cautions that the checker finds, of those that the right step does not have."""
    if not mutation.step:
        return ()
    areas = tuple(dict.fromkeys(_AREAS[check] for check in mutation.checks))
    sizes = (1, 2, 64) if "bits" in mutation.name else (1, 2, 4)
    sizes, steps = ((2,), 24) if quick else (sizes, 96 if "independence" in areas else 40)
    report = check_step(STEPS[mutation.step](), checks=areas, sizes=sizes, climbs=0, steps=steps)
    found = [f.check for f in (*report.faults, *report.cautions)]
    return tuple(check for check in dict.fromkeys(found) if check in mutation.checks)


class _Failures:
    def __init__(self) -> None:
        self.failed: list[str] = []
        self.ran = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.failed:
            self.failed.append(report.nodeid)


def by_tests(mutation: Mutation) -> tuple[tuple[str, ...], str]:
    """The first test that fails, and what went wrong where none could run."""
    if not mutation.tests:
        return (), ""
    failures = _Failures()
    os.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        pytest.main([*mutation.tests, *options], plugins=[failures])
    return tuple(failures.failed[:1]), "" if failures.ran or failures.failed else "no test ran"


def judged(mutation: Mutation, *, tests: bool = True, first: bool = False) -> Caught:
    """Plant the bug in a process of its own, and see who notices; `first`: no tests where the checker does."""
    reading, writing = os.pipe()
    warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(SECONDS)
        caught = Caught()
        try:
            with planted(mutation):
                try:
                    caught.checks = by_checker(mutation, quick=True)
                    if tests and not caught.checks:
                        caught.checks = by_checker(mutation)
                except Exception as error:
                    caught.trouble = f"{type(error).__name__}: {error}"[:300]
                if tests and not (first and caught.checks):
                    caught.tests, told = by_tests(mutation)
                    caught.trouble = "; ".join(filter(None, (caught.trouble, told)))
        except BaseException as error:
            caught.trouble = f"{type(error).__name__}: {error}"[:300]
        os.write(writing, json.dumps(asdict(caught)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    data = json.loads(told) if told else {"trouble": f"ended after {SECONDS} seconds"}
    fields = {**data, "checks": tuple(data.get("checks", ())), "tests": tuple(data.get("tests", ()))}
    return Caught(**{**fields, "seconds": time.monotonic() - start})
