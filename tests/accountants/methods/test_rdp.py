# SPDX-License-Identifier: Apache-2.0
import math
import warnings

import mpmath
import numpy as np
import pytest

from accountants import Gaussian, PoissonSampled, accountant
from accountants.methods.rdp import ORDERS, renyi
from tests.support.accountants.conformance import AccountantConformance
from tests.support.accountants.reference import ROWS


class TestRDP(AccountantConformance):
    rule = accountant("rdp")

    def test_is_adaptive(self):
        assert self.rule.adaptive


def _divergence(sigma, q, order):
    """log A(a) / (a - 1) by 25-digit quadrature."""
    with mpmath.workdps(25):
        s, q, a = mpmath.mpf(sigma), mpmath.mpf(q), mpmath.mpf(order)

        def integrand(z):
            u = q * mpmath.expm1((2 * z - 1) / (2 * s * s))
            return mpmath.npdf(z, 0, s) * ((1 + u) ** a - 1 - a * u)

        points = mpmath.linspace(-12 * s, a + 12 * s, 25)
        return float(mpmath.log1p(mpmath.quad(integrand, points)) / (a - 1))


@pytest.mark.parametrize(
    ("sigma", "q", "order"),
    [
        (1, 0.01, 1.7),
        (0.5, 0.1, 7.8),
        (10, 1e-5, 2.5),
        (4, 0.99, 1.05),
        (1, 0.01, 8),
        (2, 0.5, 32),
        (0.3, 0.01, 3),
    ],
)
def test_single_orders_equal_quadrature(sigma, q, order):
    index = int(np.argmin(np.abs(ORDERS - order)))
    value, truth = renyi(PoissonSampled(q, Gaussian(sigma)))[index], _divergence(sigma, q, ORDERS[index])
    assert truth <= value <= truth * (1 + 3e-9)


def test_tiny_noise_multiplier_interpolates_above():
    exact = _divergence(0.04, 0.3, 2.5)
    index = int(np.argmin(np.abs(ORDERS - 2.5)))
    assert exact <= renyi(PoissonSampled(0.3, Gaussian(0.04)))[index] <= exact * 1.1
    assert np.all(renyi(PoissonSampled(0.5, Gaussian(1e-200))) == math.inf)


def test_interpolation_joins_quadrature():
    below, above = (renyi(PoissonSampled(0.1, Gaussian(s))) for s in (0.0499999, 0.0500001))
    assert np.all(below >= above * (1 - 1e-9))


@pytest.mark.parametrize("row", ROWS)
def test_finer_than_the_usual_orders_opacus(row):
    from_opacus = _opacus("RDPAccountant", row)
    ours = accountant("rdp").curve(row.event).epsilon(row.delta)
    assert ours <= from_opacus * 1.001
    assert from_opacus == pytest.approx(row.opacus_rdp, rel=1e-4)
    if row not in (ROWS[13], ROWS[15], ROWS[19]):  # 14: top order 63 binds; 16, 20: bottom order 1.1
        assert ours == pytest.approx(from_opacus, rel=5e-3)


@pytest.mark.parametrize("row", [ROWS[0], ROWS[1], ROWS[5], ROWS[7], ROWS[11], ROWS[13]])
def test_finer_than_the_usual_orders_dp_accounting(row):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant

        step = dp_accounting.PoissonSampledDpEvent(row.q, dp_accounting.GaussianDpEvent(row.sigma))
        theirs = RdpAccountant().compose(step, row.steps).get_epsilon(row.delta)
    assert accountant("rdp").curve(row.event).epsilon(row.delta) <= theirs * 1.001


def _opacus(name, row):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import opacus.accountants

        theirs = getattr(opacus.accountants, name)()
        theirs.history = [(row.sigma, row.q, row.steps)]
        return theirs.get_epsilon(row.delta)


def test_small_epsilons_do_not_meet_a_floor():
    # the floor at order 63 is 0.1; at order 1024 0.006
    assert accountant("rdp").curve(PoissonSampled(0.001, Gaussian(30.0))).epsilon(1e-5) < 0.003
    assert accountant("rdp").curve(PoissonSampled(1e-6, Gaussian(1000.0))).epsilon(1e-5) == 0


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0, 60.0])
def test_covers_zero_concentrated_privacy(sigma):
    rho, delta = 1 / (2 * sigma * sigma), 1e-6
    usual = rho + 2 * math.sqrt(rho * math.log(1 / delta))
    assert accountant("rdp").curve(Gaussian(sigma)).epsilon(delta) <= usual
