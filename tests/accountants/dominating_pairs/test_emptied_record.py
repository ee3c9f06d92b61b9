# SPDX-License-Identifier: Apache-2.0
"""A record emptied in a sample of fixed size: its curve in many digits, whole mechanisms, two steps, and moments."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import REPLACE, ZERO_OUT, FixedSize, Gaussian, PoissonSampled, Repeated, accountant
from accountants.dominating_pairs.emptied_record import emptied_curve, emptied_delta
from accountants.dominating_pairs.sampled_step import EMPTIED, Step
from accountants.methods.renyi_divergences import ORDERS, renyi
from tests.support.accountants.conformance import QUICK
from tests.support.accountants.mixtures import fixed_size, hockey

EXACT = mpmath.MPContext()
EXACT.dps = 40


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (0.5, 0.3), (10.0, 1e-3), (3.0, 0.9)])
def test_guarantee_emptied_curve_is_never_below_many_digits(sigma, rate):
    s, q = EXACT.mpf(sigma), EXACT.mpf(rate)
    for epsilon in (0.0, 1e-4, 0.03, 0.7, 3.0, 11.0):
        e = EXACT.exp(EXACT.mpf(epsilon))
        a, b, c = q * EXACT.exp(-2 / s**2), -e * q * EXACT.exp(-1 / (2 * s * s)), -(1 - q) * (e - 1)
        x = s * s * EXACT.log((-b + EXACT.sqrt(b * b - 4 * a * c)) / (2 * a))
        full = q * EXACT.ncdf((2 - x) / s) - e * q * EXACT.ncdf((1 - x) / s) + c * EXACT.ncdf(-x / s)
        inner = EXACT.log(1 + (e - 1) / q)
        other = q * (
            EXACT.ncdf(1 / (2 * s) - inner * s) - EXACT.exp(inner) * EXACT.ncdf(-1 / (2 * s) - inner * s)
        )
        for is_full, truth in ((True, full), (False, other)):
            mine = float(emptied_curve(Step(sigma, rate, EMPTIED), is_full, np.array([epsilon]))[0])
            assert truth <= mine + 1e-300
            assert mine <= truth * (1 + 1e-8) + 1e-16


@QUICK
@given(
    st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    st.floats(-1, 1),
    st.integers(1, 3),
    st.floats(0.4, 3),
    st.floats(0, 3),
)
def test_guarantee_an_emptied_record_is_covered_whatever_the_others_are(others, own, size, sigma, epsilon):
    """All samples of a dataset of four, written out: both directions are below the pair."""
    with_it, without = fixed_size([*others, own], size), fixed_size([*others, 0.0], size)
    bound = emptied_delta(Step(sigma, size / 4, EMPTIED), epsilon)
    assert hockey(with_it, without, sigma, epsilon) <= bound + 1e-7
    assert hockey(without, with_it, sigma, epsilon) <= bound + 1e-7


@pytest.mark.parametrize(("size", "sigma"), [(1, 1.0), (2, 0.7), (1, 4.0)])
def test_the_bound_is_attained_where_all_others_are_opposite(size, sigma):
    with_it, without = fixed_size([-1.0, -1.0, -1.0, 1.0], size), fixed_size([-1.0, -1.0, -1.0, 0.0], size)
    for epsilon in (0.0, 0.3, 1.0):
        bound = emptied_delta(Step(sigma, size / 4, EMPTIED), epsilon)
        assert hockey(with_it, without, sigma, epsilon) == pytest.approx(bound, rel=1e-4)


def test_guarantee_two_emptied_steps_compose():
    """The worst dataset of one step taken twice, on a plane, by quadrature: the price is above it, and close."""
    sigma, rate = 1.0, 0.25
    x = np.linspace(-10, 12, 3001)

    def bump(c):
        return np.exp(-((x - c) ** 2) / 2 / sigma**2) / sigma / math.sqrt(2 * math.pi)

    p, q = (1 - rate) * bump(0) + rate * bump(2), (1 - rate) * bump(0) + rate * bump(1)
    curve = accountant("pld", ZERO_OUT).curve(Repeated(FixedSize(1, 4, Gaussian(sigma)), 2))
    for epsilon in (0.2, 1.0, 2.0):
        gap = np.outer(p, p) - math.exp(epsilon) * np.outer(q, q)
        truth = float(np.sum(np.maximum(gap, 0)) * (x[1] - x[0]) ** 2)
        assert truth - 1e-6 <= curve.delta(epsilon) <= truth * 1.2
        assert (
            accountant("rdp", ZERO_OUT).curve(Repeated(FixedSize(1, 4, Gaussian(sigma)), 2)).delta(epsilon)
            >= truth
        )


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.01), (0.8, 0.2), (6.0, 0.5)])
def test_guarantee_renyi_of_an_emptied_record_is_that_of_its_curve(sigma, rate):
    """A(a) - 1 = a (a-1) integral of exp((a-1) t) H(t) + exp(-a t) H'(t), H' the reverse; the larger direction."""
    step = Step(sigma, rate, EMPTIED)
    found = renyi(step)
    t = np.linspace(0, 3, 400_001) if sigma > 5 else np.linspace(0, 60, 400_001)
    full, other = emptied_curve(step, True, t), emptied_curve(step, False, t)
    for order in (1.1, 2.0, 3.5, 8.0):
        sums = [
            float(np.trapezoid(np.exp((order - 1) * t) * one + np.exp(-order * t) * two, t))
            for one, two in ((full, other), (other, full))
        ]
        value = math.log1p(order * (order - 1) * max(sums)) / (order - 1)
        mine = float(found[np.argmin(np.abs(ORDERS - order))])
        assert value * (1 - 2e-3) <= mine <= value * (1 + 1e-6)  # the sum errs upwards


@QUICK
@given(st.integers(1, 30), st.floats(0.6, 6), st.integers(1, 200))
def test_emptied_lies_between_a_poisson_sample_and_a_replacement(size, sigma, count):
    event = Repeated(FixedSize(size, 50, Gaussian(sigma)), count)
    sampled = Repeated(PoissonSampled(size / 50, Gaussian(sigma)), count)
    for name in ("pld", "rdp"):
        emptied = accountant(name, ZERO_OUT).curve(event).epsilon(1e-5)
        assert emptied <= accountant(name, REPLACE).curve(event).epsilon(1e-5) * (1 + 1e-3)
        assert emptied >= accountant(name, ZERO_OUT).curve(sampled).epsilon(1e-5) * (1 - 1e-3)
        assert emptied <= accountant(name).curve(Repeated(Gaussian(sigma), count)).epsilon(1e-5) * (1 + 1e-3)
