# SPDX-License-Identifier: Apache-2.0
"""Moments of likelihood ratios: sums against many digits, alone and in company, at the ends of the orders."""

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accountants import Gaussian, PoissonSampled
from accountants.dominating_pairs.renyi_moments import log_excess
from accountants.dominating_pairs.sampled_step import EMPTIED, FIXED, GROUP, POISSON, SHIFTED, Step
from accountants.methods.renyi_divergences import _KNOWN, ORDERS, divergences, renyi
from tests.support.accountants.conformance import QUICK

EXACT = mpmath.MPContext()
EXACT.dps = 40
KINDS = [
    Step(1.0, 0.01),
    Step(1.0, 0.01, POISSON),
    Step(1.0, 0.01, FIXED),
    Step(1.0, 0.01, EMPTIED),
    Step(1.0, 0.01, SHIFTED, shift=0.3),
    Step(1.0, 0.01, GROUP, size=4),
]


@settings(QUICK, max_examples=60)
@given(
    st.lists(st.floats(-600, 600) | st.floats(-3, 3) | st.floats(-0.1, 0.1), min_size=1, max_size=6),
    st.sampled_from([1.001, 1.7, 9.0, 400.0]),
)
def test_sums_keep_their_digits(losses, order):
    """h_a(l) = exp(a l) - 1 - a (exp(l) - 1), whatever the sizes of a and l, for a > 1 and for 1 - a."""
    for a in (order, 1 - order):
        exact = EXACT.fsum(
            EXACT.expm1(EXACT.mpf(a) * EXACT.mpf(x)) - EXACT.mpf(a) * EXACT.expm1(EXACT.mpf(x))
            for x in losses
        )
        found = float(log_excess(np.array([a]), np.array([losses]), np.zeros((1, len(losses))))[0, 0])
        if EXACT.exp(-600) < exact < EXACT.exp(1e5):
            assert found == pytest.approx(float(EXACT.log(exact)), abs=1e-9, rel=1e-12)


@pytest.mark.parametrize(
    ("sigma", "q", "order"),
    [(1.0, 0.01, 4.0), (0.02, 0.3, 1.05), (20.0, 0.01, 4096.0), (100.0, 1e-7, 8192.0), (0.3, 0.9, 11.0)],
)
def test_integer_and_other_orders_of_a_sample(sigma, q, order):
    """The binomial sum for integers, the integral in many digits else."""
    s, p, a = EXACT.mpf(sigma), EXACT.mpf(q), EXACT.mpf(order)
    index = int(np.argmin(np.abs(ORDERS - order)))
    assert ORDERS[index] == order
    if order == int(order):
        moment = EXACT.fsum(
            EXACT.binomial(int(order), k)
            * (1 - p) ** (int(order) - k)
            * p**k
            * EXACT.exp(k * (k - 1) / (2 * s * s))
            for k in range(int(order) + 1)
        )
    else:
        points = [c + t * s for c in (0, float(order)) for t in range(-12, 13, 2)]
        moment = EXACT.quad(
            lambda x: EXACT.npdf(x, 0, s) * (1 - p + p * EXACT.exp((2 * x - 1) / (2 * s * s))) ** a,
            sorted(points),
        )
    truth = float(EXACT.log(moment) / (a - 1))
    assert truth * (1 - 1e-12) <= renyi(PoissonSampled(q, Gaussian(sigma)))[index] <= truth * (1 + 3e-9)


def test_a_replacement_at_a_high_rate_and_order():
    """The bulk moves twice as far where nearly all are drawn."""
    sigma, q, order = 40.0, 0.97, 724.0
    x = np.linspace(-3000, 5000, 400_001)

    def log_density(sign):
        one = np.log(q) - (x - sign) ** 2 / 2 / sigma**2
        return np.logaddexp(np.log1p(-q) - x * x / 2 / sigma**2, one) - math.log(
            sigma * math.sqrt(2 * math.pi)
        )

    logs = order * log_density(1) + (1 - order) * log_density(-1)
    truth = (float(np.logaddexp.reduce(logs)) + math.log(x[1] - x[0])) / (order - 1)
    found = renyi(Step(sigma, q, POISSON))[int(np.argmin(np.abs(ORDERS - order)))]
    assert truth * (1 - 1e-9) <= found <= truth * (1 + 1e-8)


@pytest.mark.parametrize("kind", KINDS, ids=lambda step: step.pair)
def test_company_changes_no_divergence(kind):
    from dataclasses import replace

    steps = [
        replace(kind, noise_multiplier=1.0 + i / 300, sampling_rate=q) for i, q in enumerate((0.01, 0.3) * 12)
    ]
    together = divergences(steps)
    for step, row in zip(steps, together, strict=True):
        _KNOWN.pop(step)
        np.testing.assert_allclose(renyi(step), row, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=lambda step: step.pair)
@pytest.mark.parametrize("noise", [0.011, 0.05, 0.4, 3.0, 50.0, 1e6])
def test_divergences_grow_with_the_order_and_fall_with_noise(kind, noise):
    from dataclasses import replace

    less, more = (renyi(replace(kind, noise_multiplier=x)) for x in (noise, noise * 1.3))
    assert np.all(np.isfinite(less)) and np.all(less > 0)
    assert np.all(np.diff(less) >= -1e-8 * less[1:])
    assert np.all(more <= less * (1 + 1e-8))
