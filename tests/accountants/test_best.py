# SPDX-License-Identifier: Apache-2.0
import pytest

from accountants import (
    AdaptiveSchedule,
    Composed,
    Gaussian,
    NonPrivate,
    PoissonSampled,
    Repeated,
    UnpricedEvent,
    accountant,
    best,
)
from tests.support.accountants.reference import DIGITS, ROWS

STEP = PoissonSampled(0.01, Gaussian(1.0))


@pytest.mark.parametrize("number", [1, 4, 7, 12, 19, 20])
def test_never_above_the_others_never_below_the_truth(number):
    row = ROWS[number - 1]
    bound = best(row.event, row.delta)
    assert row.tight * (1 - DIGITS) <= bound.epsilon <= row.tight * 1.0005
    for name in ("pld", "rdp"):
        assert bound.epsilon <= accountant(name).curve(row.event).epsilon(row.delta)


def test_says_which():
    assert best(Repeated(STEP, 1000), 1e-5).method == "pld"
    assert best(Repeated(Gaussian(2.0), 10), 1e-5).method == "closed form"
    assert best(Repeated(PoissonSampled(0.1, Gaussian(1.0)), 30), 1e-290).method == "rdp"
    assert best(Composed(()), 1e-5).epsilon == 0
    assert best(Composed((STEP, NonPrivate())), 1e-5).epsilon == float("inf")
    assert best(Repeated(STEP, 10), 1e-5, schedule="public") == best(Repeated(STEP, 10), 1e-5)


def test_refuses_adaptive_schedules():
    with pytest.raises(
        AdaptiveSchedule, match=r"must be fixed .*got a schedule chosen .*spend through a Filter"
    ):
        best(STEP, 1e-5, schedule="dp_history")
    with pytest.raises(ValueError, match=r"schedule must be one of .*got 'rl'"):
        best(STEP, 1e-5, schedule="rl")
    with pytest.raises(ValueError, match="delta must be a number"):
        best(STEP, 2.0)
    with pytest.raises(UnpricedEvent):
        best(PoissonSampled(0.1, Repeated(Gaussian(1.0), 2)), 1e-5)
