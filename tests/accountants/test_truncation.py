# SPDX-License-Identifier: Apache-2.0
"""The delta that truncation costs besides: the binomial tail, how it adds up, and what it leaves of delta."""

import math

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import RELATIONS, Gaussian, PoissonSampled, Repeated, TruncatedPoisson, accountant
from accountants.dominating_pairs.truncated_poisson import overflow
from tests.support.accountants.conformance import QUICK

NAMES = ("pld", "prv", "rdp", "zcdp")


def test_guarantee_slip_is_the_binomial_tail():
    exact = mpmath.MPContext()
    exact.dps = 30
    for rate, most, records in ((0.01, 650, 50_000), (0.3, 4, 6), (1e-4, 60, 200_000), (0.5, 1000, 1500)):
        q, n = exact.mpf(rate), records - 1
        terms = (
            exact.binomial(n, j) * q**j * (1 - q) ** (n - j) for j in range(most, min(n, most + 400) + 1)
        )
        truth = q * exact.fsum(terms)
        mine = overflow(TruncatedPoisson(rate, most, records, Gaussian(1.0)))
        assert truth <= mine <= truth * (1 + 1e-7)
    assert overflow(TruncatedPoisson(0.3, 6, 6, Gaussian(1.0))) == 0
    assert overflow(TruncatedPoisson(1e-9, 10**6, 10**9, Gaussian(1.0))) >= 1e-300


@pytest.mark.parametrize("name", NAMES)
def test_slips_add_up_and_exhaust_delta(name):
    step = TruncatedPoisson(0.01, 580, 50_000, Gaussian(1.0))
    curve, slip = accountant(name).curve(Repeated(step, 100)), 100 * overflow(step)
    plain = accountant(name).curve(Repeated(PoissonSampled(0.01, Gaussian(1.0)), 100))
    assert curve.slip == pytest.approx(slip)
    assert curve.delta(1.0) == pytest.approx(min(1.0, plain.delta(1.0) + slip), rel=1e-9)
    assert curve.epsilon(3 * slip) >= plain.epsilon(2 * slip) * (1 - 1e-3)
    assert (curve + curve).delta(50.0) >= 2 * slip * (1 - 1e-12)
    assert (curve * 3).slip == pytest.approx(3 * slip)
    assert math.isinf(curve.epsilon(slip * 0.99)) and math.isinf(curve.epsilon(slip))
    assert curve.delta(math.inf) >= slip


@QUICK
@given(
    st.floats(0.05, 0.5),
    st.integers(1, 10),
    st.integers(12, 60),
    st.floats(0.6, 4),
    st.sampled_from(sorted(RELATIONS)),
)
def test_monotone_in_cap_records_and_noise(rate, most, records, sigma, relation):
    def price(most, records, sigma):
        event = TruncatedPoisson(rate, most, records, Gaussian(sigma))
        return accountant("rdp", relation).curve(event).delta(0.5)

    here = price(most, records, sigma) * (1 - 1e-9)
    assert price(most, records + 5, sigma) >= here
    assert price(most, records, sigma / 1.5) >= here
    assert price(most + 1, records, sigma) * (1 - 1e-9) <= price(most, records, sigma)
