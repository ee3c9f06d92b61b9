# SPDX-License-Identifier: Apache-2.0
"""The lower bound: below exact curves step by step, below known values, and near the upper bounds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import Composed, Gaussian, NonPrivate, PoissonSampled, Repeated, accountant, leaves
from accountants.dominating_pairs.connect_the_dots import reach
from accountants.dominating_pairs.sampled_step import Step
from accountants.floor import _tangents, lower_epsilon, lowered
from tests.support.accountants.conformance import QUICK, counts, deltas, rates, sigmas
from tests.support.accountants.lower import lower_epsilon as by_hoeffding
from tests.support.accountants.oracle import EXACT, exact_delta
from tests.support.accountants.reference import DIGITS, ROWS

PLD = accountant("pld")


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize(
    ("sigma", "q", "mesh"),
    [(1, 0.01, 2e-3), (0.5, 0.3, 0.02), (10, 1e-5, 3e-8), (3, 1.0, 0.01), (0.4, 1e-4, 0.01), (40, 0.5, 1e-3)],
)
def test_one_step_is_optimistic(sigma, q, mesh, removed):
    step, mesh = Step(sigma, q), float(np.float32(mesh))
    law = lowered(step, removed, mesh, reach([step], removed, 1e-12)[0])
    losses = mesh * (law.first + np.arange(len(law.masses)))
    assert law.masses.min() >= 0
    assert law.infinite == 0
    assert 0.9 < law.masses.sum() <= 1
    places = np.unique(
        np.concatenate(
            [
                np.arange(1, 26, 2),
                len(losses) - np.arange(1, 8),
                np.linspace(1, len(losses) - 1, 9).astype(int),
            ]
        )
    )
    for i in places[places < len(losses)]:
        for e in (losses[i], losses[i] - mesh / 2):
            kept = [(p, x) for p, x in zip(law.masses[i:], losses[i:], strict=True) if x > e]
            mine = EXACT.fsum(
                EXACT.mpf(float(p)) * -EXACT.expm1(EXACT.mpf(float(e)) - EXACT.mpf(float(x))) for p, x in kept
            )
            assert mine <= exact_delta(sigma, q, removed, e)


@pytest.mark.parametrize("number", range(1, 21))
def test_below_the_truth_and_near_it(number):
    row = ROWS[number - 1]
    lower = lower_epsilon(row.event, row.delta)
    assert lower <= row.tight * (1 + DIGITS)
    if number != 16:  # one step reaches losses of 100 while its bulk lies within a thousandth
        assert lower >= row.tight * 0.998


@QUICK
@given(st.lists(st.tuples(sigmas, rates, counts), min_size=1, max_size=3), deltas)
def test_brackets_the_upper_bound(parts, delta):
    event = Composed(tuple(Repeated(PoissonSampled(q, Gaussian(s)), n) for s, q, n in parts))
    upper = PLD.curve(event).epsilon(delta)
    lower = lower_epsilon(event, delta)
    assert lower <= upper
    assert lower >= upper * 0.99 - 1e-9


@pytest.mark.parametrize("number", [1, 9, 12])
def test_above_a_cruder_proof(number):
    row = ROWS[number - 1]
    upper = PLD.curve(row.event).epsilon(row.delta)
    assert by_hoeffding(leaves(row.event), upper, row.delta) <= lower_epsilon(row.event, row.delta) <= upper


@pytest.mark.parametrize(("sigma", "q"), [(200.0, 1e-9), (0.3, 0.001), (0.5, 1e-5)])
def test_tangents_keep_their_digits(sigma, q):
    """Tiny losses beside large ones: the touching point is found without subtracting large numbers."""
    step = Step(sigma, q)
    losses = -q + np.arange(1, 12) * q / 2
    heights = _tangents(step, losses)
    for loss, height in zip(losses[1:], heights[1:], strict=True):
        excess = exact_delta(sigma, q, True, loss) + EXACT.expm1(EXACT.mpf(float(loss)))
        assert 0 <= height <= excess


def test_ends():
    assert lower_epsilon(Composed(()), 1e-5) == 0
    assert lower_epsilon(NonPrivate(), 1e-5) == float("inf")
    assert lower_epsilon(Repeated(PoissonSampled(0.1, Gaussian(1.0)), 5), 1e-290) == 0
    with pytest.raises(ValueError, match="delta must be a number"):
        lower_epsilon(Gaussian(1.0), 2.0)
