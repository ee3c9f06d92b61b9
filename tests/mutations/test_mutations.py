# SPDX-License-Identifier: Apache-2.0
"""Privacy bugs planted in our own code: every one is noticed, by the step checker or by a test of the suite."""

import inspect
from pathlib import Path

import pytest

from dpopt.audit.step_checks import check_step
from tests.mutations.judging import judged
from tests.mutations.mutating import Edit, Mutation, function_at, planted
from tests.mutations.own_steps import COUPLED, STEPS
from tests.mutations.planted_bugs import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
QUICK = [m for m in MUTATIONS if m.quick]


def name(mutation):
    return mutation.name


@pytest.mark.parametrize("mutation", QUICK, ids=name)
def test_a_planted_bug_is_found_by_the_step_checker(mutation):
    caught = judged(mutation, tests=False)
    assert caught.checks, caught.trouble or caught.seconds


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=name)
def test_every_planted_bug_is_noticed(mutation):
    caught = judged(mutation)
    assert caught.any, caught.trouble


@pytest.mark.parametrize("mutation", MUTATIONS, ids=name)
def test_the_place_of_every_bug_is_still_there(mutation):
    with planted(mutation):
        pass
    assert mutation.step in ("", *STEPS) and (mutation.checks or mutation.tests)
    for test in mutation.tests:
        path, _, function = test.partition("::")
        assert (ROOT / path).exists(), test
        assert f"def {function}(" in (ROOT / path).read_text() if function else True, test


def test_there_are_many_bugs_of_every_kind():
    kinds = {m.kind: sum(other.kind == m.kind for other in MUTATIONS) for m in MUTATIONS}
    assert len(MUTATIONS) >= 100 and min(kinds.values()) >= 10
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
    assert len(COUPLED) >= 5


def test_a_bug_is_gone_after_the_block():
    place = "clipping.clippers:FlatClipper.weights"
    before = function_at(place).__code__
    with planted(Mutation("none", "none", (Edit(place, "clamp_max(1)", "clamp_max(2)"),))):
        assert function_at(place).__code__ is not before
    assert function_at(place).__code__ is before and "clamp_max(1)" in inspect.getsource(function_at(place))
    wrong = Mutation("none", "none", (Edit(place, "not in the text", ""),))
    with pytest.raises(LookupError, match="once in"), planted(wrong):
        pass


@pytest.mark.parametrize(
    "step",
    [
        "explicit",
        *(pytest.param(s, marks=pytest.mark.slow) for s in STEPS if s != "explicit" and s not in COUPLED),
    ],
)
def test_our_own_steps_are_not_accused(step):
    if step in ("averaging", "batch norm"):  # refused, unless a bug lets them through
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            check_step(STEPS[step](), sizes=(1, 2), steps=20)
        return
    report = check_step(STEPS[step](), sizes=(1, 2), climbs=0, steps=40)
    assert report.faults == (), str(report)
    assert {f.check for f in report.cautions} <= {"number of records"}
