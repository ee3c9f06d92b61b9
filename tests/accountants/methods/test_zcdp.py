# SPDX-License-Identifier: Apache-2.0
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import BY_RECORD, Gaussian, OncePerEpoch, PoissonSampled, Repeated, accountant, best
from accountants.dominating_pairs.gaussian import gaussian_delta, gaussian_epsilon
from tests.support.accountants.conformance import QUICK, AccountantConformance

ZCDP = accountant("zcdp")


class TestZCDP(AccountantConformance):
    rule = ZCDP

    def test_is_adaptive(self):
        assert self.rule.adaptive


@QUICK
@given(st.floats(0.05, 30), st.integers(1, 100), st.floats(1e-12, 0.1), st.floats(0, 30))
def test_guarantee_zcdp_is_never_below_the_gaussian(sigma, count, delta, epsilon):
    mu = math.sqrt(count) / sigma
    curve = ZCDP.curve(Repeated(Gaussian(sigma), count))
    assert curve.rho == pytest.approx(mu * mu / 2)
    assert curve.epsilon(delta) >= gaussian_epsilon(mu, delta) * (1 - 1e-9)
    assert curve.delta(epsilon) >= gaussian_delta(mu, epsilon) * (1 - 1e-9)
    assert curve.epsilon(delta) <= curve.rho + 2 * math.sqrt(curve.rho * -math.log(delta)) + 1e-9


@pytest.mark.parametrize(("sigma", "count"), [(1.0, 1), (5.0, 10), (40.0, 3), (0.3, 20)])
def test_is_the_renyi_line_at_the_best_order(sigma, count):
    event = Repeated(Gaussian(sigma), count)
    line, grid = ZCDP.curve(event), accountant("rdp").curve(event)
    assert line.epsilon(1e-6) == pytest.approx(grid.epsilon(1e-6), rel=2e-3)
    assert line.epsilon(1e-6) <= grid.epsilon(1e-6) * (1 + 1e-8)


def test_sampling_is_forgotten_and_epochs_are_gaussians():
    assert ZCDP.curve(PoissonSampled(0.01, Gaussian(2.0))) == ZCDP.curve(Gaussian(2.0))
    assert ZCDP.curve(OncePerEpoch(9, BY_RECORD, Gaussian(2.0))) == ZCDP.curve(Gaussian(2.0))


def test_the_closed_form_is_the_best_for_full_batches():
    """Exact Gaussian privacy, of Gaussians only: below every line and every grid."""
    for event in (Repeated(Gaussian(3.0), 5), Repeated(OncePerEpoch(9, BY_RECORD, Gaussian(3.0)), 5)):
        bound = best(event, 1e-5)
        assert bound.method == "closed form"
        assert bound.epsilon == gaussian_epsilon(math.sqrt(5) / 3 * (1 + 1e-15), 1e-5)
        assert bound.epsilon < ZCDP.curve(event).epsilon(1e-5)


def test_refuses_to_add_relations():
    with pytest.raises(ValueError, match="curves must be of one relation"):
        ZCDP.curve(Gaussian(1.0)) + accountant("zcdp", "replace-one").curve(Gaussian(1.0))
