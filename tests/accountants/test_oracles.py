# SPDX-License-Identifier: Apache-2.0
"""Every accountant against exact curves of one to three steps."""

import pytest
from scipy.optimize import brentq

from accountants import Composed, Gaussian, PoissonSampled, accountant
from accountants.dominating_pairs.gaussian import gaussian_delta, sampled_delta
from accountants.floor import lower_epsilon
from tests.support.accountants.oracle import composed, exact_delta


def event(steps):
    return Composed(tuple(PoissonSampled(q, Gaussian(sigma)) for sigma, q in steps))


@pytest.mark.parametrize("epsilon", [0.0, 1e-4, 0.3, 4.0])
@pytest.mark.parametrize(("sigma", "q"), [(1, 0.01), (0.4, 1e-4), (10, 0.3), (3, 0.999), (0.7, 1.0)])
def test_closed_forms_are_exact_to_nine_digits_from_above(sigma, q, epsilon):
    truth = max(exact_delta(sigma, q, removed, epsilon) for removed in (True, False))
    if truth < 1e-250:
        pytest.skip("below the range of float64")
    mine = sampled_delta(1 / sigma, q, epsilon) if q < 1 else gaussian_delta(1 / sigma, epsilon)
    assert truth <= mine <= truth * (1 + 1e-9)


STEPS = [
    ((1.0, 0.1), (1.0, 0.1)),
    ((0.6, 0.02), (1.5, 0.5)),
    ((4.0, 0.3), (4.0, 0.3)),
    ((1.0, 0.2), (1.0, 0.2), (1.0, 0.2)),
    ((0.8, 0.5), (2.0, 0.05), (1.2, 0.9)),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("delta", [1e-3, 1e-5])
def test_compositions_of_two_and_three_lie_between_the_bounds(steps, delta):
    value, error = max(composed(steps, removed, 0.7) for removed in (True, False))
    assert error <= (1e-9 if len(steps) == 2 else 1e-7) * value + 1e-13

    def excess(epsilon):
        return max(composed(steps, removed, epsilon)[0] for removed in (True, False)) - delta

    upper = {name: accountant(name).curve(event(steps)).epsilon(delta) for name in ("pld", "prv", "rdp")}
    lower = lower_epsilon(event(steps), delta)
    assert upper["pld"] <= 1.002 * lower
    if len(steps) > 2:  # two dimensions: at the ends only
        assert excess(lower * (1 - 1e-9)) >= 0 >= max(excess(value * (1 + 1e-9)) for value in upper.values())
    else:
        truth = brentq(excess, 0.9 * lower, upper["rdp"], xtol=1e-12, rtol=1e-12)
        assert lower <= truth * (1 + 1e-9)
        assert all(value >= truth * (1 - 1e-9) for value in upper.values())
        assert upper["pld"] <= truth * 1.001


@pytest.mark.parametrize("steps", STEPS[:3])
@pytest.mark.parametrize("epsilon", [0.05, 1.0, 3.0])
def test_deltas_of_compositions_are_upper_bounds(steps, epsilon):
    truth, error = max(composed(steps, removed, epsilon) for removed in (True, False))
    deltas = {name: accountant(name).curve(event(steps)).delta(epsilon) for name in ("pld", "prv", "rdp")}
    assert all(value >= truth - error for value in deltas.values())
    if truth > 1e-10:
        assert deltas["pld"] <= truth * 1.02 + error
