# SPDX-License-Identifier: Apache-2.0
"""A record replaced: the curve of one step in many digits, its Renyi moments, and two steps by quadrature."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import RELATIONS, REPLACE, Gaussian, PoissonSampled, Repeated, accountant
from accountants.dominating_pairs.replaced_record import swapped_curve
from accountants.dominating_pairs.sampled_step import FIXED, POISSON, Step
from accountants.methods.rdp import ORDERS, renyi
from tests.support.accountants.conformance import QUICK


@QUICK
@given(st.floats(0.02, 0.9), st.floats(0.5, 3), st.floats(0, 3), st.floats(0, 1), st.floats(0, math.pi))
def test_guarantee_the_worst_replacement_lies_on_a_line(rate, sigma, epsilon, length, angle):
    """In the plane, for a record of norm 1 and another at any angle, of any norm up to 1."""
    grid = np.linspace(-1 - 7 * sigma, 1 + 7 * sigma, 501)
    x, y = np.meshgrid(grid, grid)

    def density(a, b):
        def bump(u, v):
            return np.exp(-((x - u) ** 2 + (y - v) ** 2) / 2 / sigma**2) / (2 * np.pi * sigma**2)

        return (1 - rate) * bump(0, 0) + rate * bump(a, b)

    p, q = density(1, 0), density(length * math.cos(angle), length * math.sin(angle))
    area = (grid[1] - grid[0]) ** 2
    bound = float(swapped_curve(Step(sigma, rate, POISSON), np.array([epsilon]))[0])
    for a, b in ((p, q), (q, p)):
        assert float(np.sum(np.maximum(a - math.exp(epsilon) * b, 0)) * area) <= bound + 1e-4 * bound + 1e-6


@pytest.mark.parametrize("pair", [POISSON, FIXED])
@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (0.5, 0.3), (10.0, 1e-3), (3.0, 0.9)])
def test_guarantee_swapped_curve_is_never_below_many_digits(pair, sigma, rate):
    exact = mpmath.MPContext()
    exact.dps = 40
    s, q = exact.mpf(sigma), exact.mpf(rate)
    for epsilon in (0.0, 1e-4, 0.03, 0.7, 3.0, 11.0):
        e = exact.exp(exact.mpf(epsilon))
        if pair == FIXED:
            inner = exact.log(1 + (e - 1) / q)
            truth = q * (
                exact.ncdf(1 / s - inner * s / 2) - exact.exp(inner) * exact.ncdf(-1 / s - inner * s / 2)
            )
        else:
            c = exact.exp(-1 / (2 * s * s))
            b = (1 - q) * (e - 1)
            u = (b + exact.sqrt(b * b + 4 * e * q * q * c * c)) / (2 * q * c)
            x = s * s * exact.log(u)
            above = (1 - q) * exact.ncdf(-x / s) + q * exact.ncdf((1 - x) / s)
            truth = above - e * ((1 - q) * exact.ncdf(-x / s) + q * exact.ncdf(-(1 + x) / s))
        mine = float(swapped_curve(Step(sigma, rate, pair), np.array([epsilon]))[0])
        assert truth <= mine + 1e-300
        assert mine <= truth * (1 + 1e-8) + 1e-16


@pytest.mark.parametrize("pair", [POISSON, FIXED])
@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (0.8, 0.2), (6.0, 0.5)])
def test_guarantee_renyi_of_a_replacement_is_that_of_its_curve(pair, sigma, rate):
    """A(a) - 1 = a (a-1) integral of (exp((a-1) t) + exp(-a t)) H(t) dt, summed on a fine grid."""
    found = renyi(Step(sigma, rate, pair))
    for order in (1.1, 2.0, 3.5, 8.0):
        t = np.linspace(0, 3, 400_001) if sigma > 5 else np.linspace(0, 60, 400_001)
        weights = np.exp((order - 1) * t) + np.exp(-order * t)
        integral = np.trapezoid(weights * swapped_curve(Step(sigma, rate, pair), t), t)
        value = math.log1p(order * (order - 1) * float(integral)) / (order - 1)
        mine = float(found[np.argmin(np.abs(ORDERS - order))])
        assert value * (1 - 2e-3) <= mine <= value * (1 + 1e-6)  # the sum errs upwards


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0])
def test_renyi_of_a_replacement_grows_with_the_order_and_falls_by_sampling(sigma):
    order = np.argsort(ORDERS)
    for pair in (POISSON, FIXED):
        values = renyi(Step(sigma, 0.1, pair))
        assert np.all(np.diff(values[order] * (ORDERS[order] - 1)) > 0)
        assert np.all(values <= ORDERS * 2 / sigma**2 * (1 + 1e-6))
        assert np.all(values >= renyi(PoissonSampled(0.1, Gaussian(sigma))) * (1 - 1e-6))


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta", "truth"),
    # dp_accounting 0.6.0, PLD of replace-one Poisson, printed to 4 digits
    [(1, 0.01, 1000, 1e-5, 2.843), (0.8, 0.01, 10_000, 1e-5, 16.15), (2, 0.1, 1000, 1e-5, 17.69)],
)
def test_replace_one_equals_dp_accounting(sigma, rate, steps, delta, truth):
    event = Repeated(PoissonSampled(rate, Gaussian(sigma)), steps)
    bound = accountant("pld", REPLACE).curve(event).bound(delta)
    assert bound.epsilon == pytest.approx(truth, rel=4e-4)
    assert bound.method == "pld" and RELATIONS[REPLACE] in bound.assumptions
    assert bound.epsilon < accountant("rdp", REPLACE).curve(event).epsilon(delta) < 1.15 * truth


def test_guarantee_two_replaced_steps_compose():
    """Two steps on a plane, by quadrature: the price is above, and close."""
    rate, sigma = 0.3, 1.0
    x = np.linspace(-9, 9, 3001)

    def density(centre):
        bump = lambda c: np.exp(-((x - c) ** 2) / 2) / math.sqrt(2 * math.pi)  # noqa: E731
        return (1 - rate) * bump(0) + rate * bump(centre)

    p, q = density(1.0), density(-1.0)
    step = Repeated(PoissonSampled(rate, Gaussian(sigma)), 2)
    for epsilon in (0.2, 1.0, 2.0):
        gap = np.outer(p, p) - math.exp(epsilon) * np.outer(q, q)
        truth = float(np.sum(np.maximum(gap, 0)) * (x[1] - x[0]) ** 2)
        assert truth - 1e-6 <= accountant("pld", REPLACE).curve(step).delta(epsilon)
        assert (
            epsilon * (1 - 1e-4) <= accountant("pld", REPLACE).curve(step).epsilon(truth) <= epsilon * 1.003
        )
        assert accountant("rdp", REPLACE).curve(step).delta(epsilon) >= truth
