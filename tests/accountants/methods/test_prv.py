# SPDX-License-Identifier: Apache-2.0
import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import Composed, Gaussian, PoissonSampled, Repeated, accountant
from accountants.dominating_pairs.gaussian import gaussian_delta, gaussian_epsilon, sampled_epsilon
from accountants.methods import prv as prv_module
from tests.support.accountants.conformance import QUICK, AccountantConformance, counts, deltas, rates, sigmas
from tests.support.accountants.reference import DIGITS, ROWS

PRV, RDP = accountant("prv"), accountant("rdp")


class TestPRV(AccountantConformance):
    rule = PRV
    slack = (2e-2, 1e-9)  # the error of the Fourier estimate is a fiftieth at most

    def test_is_not_adaptive(self):
        assert not self.rule.adaptive


@pytest.mark.parametrize("number", range(1, 21))
def test_tight(number):
    """By its Fourier grid, with the numbers of Opacus, where that is small; else as "pld"."""
    row = ROWS[number - 1]
    bound = PRV.curve(row.event).bound(row.delta)
    closed, fourier = number in (6, 8, 20), number in (1, 2, 3, 9, 12)
    assert bound.method == ("closed form" if closed else "prv" if fourier else "pld")
    assert bound.epsilon >= row.tight * (1 - DIGITS)
    if fourier:
        assert bound.epsilon <= row.tight * 1.003 + 0.011
        assert bound.epsilon == pytest.approx(row.opacus_prv, rel=1e-3)
    else:
        assert bound.epsilon <= row.tight * 1.0005


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta"),
    [(1, 0.01, 1000, 1e-14), (1, 1e-7, 10**6, 1e-9), (0.7, 1e-7, 1000, 1e-5)],
)
def test_where_the_estimate_fails_connected_dots_answer(sigma, q, steps, delta):
    event = Repeated(PoissonSampled(q, Gaussian(sigma)), steps)
    bound = PRV.curve(event).bound(delta)
    assert bound == accountant("pld").curve(event).bound(delta)
    assert bound.method in ("pld", "rdp")
    assert bound.epsilon <= RDP.curve(event).epsilon(delta)


def test_equals_opacus():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        theirs = PRVAccountant()
        theirs.history = [(1.1, 0.01, 500), (0.9, 0.02, 200)]
        expected = theirs.get_epsilon(1e-5)
    steps = [PoissonSampled(0.01, Gaussian(1.1)), PoissonSampled(0.02, Gaussian(0.9))]
    ours = PRV.curve(Composed((Repeated(steps[0], 500), Repeated(steps[1], 200)))).epsilon(1e-5)
    assert ours == pytest.approx(expected, rel=1e-3)


def test_equals_the_library():
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    mechanism = PoissonSubsampledGaussianMechanism(sampling_probability=0.05, noise_multiplier=1.5)
    theirs = PRVAccountant([mechanism], eps_error=0.01, delta_error=1e-8, max_self_compositions=[300])
    upper = theirs.compute_epsilon(1e-5, [300])[2]
    assert PRV.curve(Repeated(PoissonSampled(0.05, Gaussian(1.5)), 300)).epsilon(1e-5) == pytest.approx(
        upper, rel=1e-3
    )


@QUICK
@given(sigmas, rates, counts, deltas)
def test_never_above_the_renyi_bound(sigma, q, n, delta):
    event = Repeated(PoissonSampled(q, Gaussian(sigma)), n)
    assert PRV.curve(event).epsilon(delta) <= RDP.curve(event).epsilon(delta) * (1 + 1e-9)


def test_small_epsilons_get_a_finer_grid():
    event = Repeated(PoissonSampled(0.001, Gaussian(5.0)), 100)
    exact_scale = gaussian_epsilon(0.001 * 10 / 5.0, 1e-5)  # the central limit, good to a percent here
    assert PRV.curve(event).epsilon(1e-5) == pytest.approx(exact_scale, rel=0.1)
    assert PRV.curve(event).epsilon(1e-5) < 0.01


def test_refuses_large_grids(monkeypatch):
    event = Repeated(PoissonSampled(0.013, Gaussian(1.0)), 1000)
    fine = PRV.curve(event).bound(1e-5)
    prv_module._bound.cache_clear()
    monkeypatch.setattr(prv_module, "MAX_CELLS", 20_000)
    other = PRV.curve(event).bound(1e-5)
    prv_module._bound.cache_clear()
    assert (fine.method, other.method) == ("prv", "pld")
    assert fine.epsilon - 0.02 <= other.epsilon <= fine.epsilon


def test_delta_is_the_upper_end():
    curve = PRV.curve(ROWS[0].event)
    # at the tight epsilon the tight delta is 1e-5
    assert 1e-5 * (1 - 1e-4) <= curve.delta(ROWS[0].tight) <= 1.2e-5
    assert curve.delta(ROWS[0].tight) < RDP.curve(ROWS[0].event).delta(ROWS[0].tight) / 2


def test_gaussians_compose_in_closed_form():
    event = Composed((Repeated(Gaussian(2.0), 3), Gaussian(1.0)))
    bound = PRV.curve(event).bound(1e-5)
    assert bound.method == "closed form"
    assert bound.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(3 / 4 + 1), 1e-5), rel=1e-9)


@pytest.mark.parametrize(
    ("mu", "delta"), [(1.0, 1e-5), (0.924931, 1e-5), (0.01, 1e-9), (60.0, 1e-6), (1e-4, 1e-12)]
)
def test_gaussian_closed_form_is_tight_from_above(mu, delta):
    import mpmath

    epsilon = gaussian_epsilon(mu, delta)
    with mpmath.workdps(60):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        exact = mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)
        assert exact <= delta
        assert exact >= delta * (1 - 1e-4)
        assert gaussian_delta(mu, epsilon) >= exact


def test_one_sampled_step_is_exact():
    assert sampled_epsilon(1.0, 1e-5, 1e-9) == pytest.approx(ROWS[5].tight, rel=1e-5)
    assert sampled_epsilon(1.0, 1e-5, 1e-4) == 0
    assert sampled_epsilon(60.0, 0.01, 1e-6) == pytest.approx(
        gaussian_epsilon(60.0, 1e-4) + math.log(0.01), rel=1e-9
    )


def test_mixes_sampled_and_plain_gaussians():
    event = Composed((Gaussian(3.0), Repeated(PoissonSampled(0.01, Gaussian(1.0)), 500)))
    bound = PRV.curve(event).bound(1e-5)
    assert bound.method == "prv"
    parts = [PRV.curve(e).epsilon(1e-5) for e in event.events]
    assert max(parts) < bound.epsilon < RDP.curve(event).epsilon(1e-5)


def test_registry_refuses_unknown_names():
    with pytest.raises(
        ValueError,
        match=r"accountant must be one of \['pld', 'prv', 'rdp', 'zcdp'\]; got 'gdp'; choose 'pld'",
    ):
        accountant("gdp")


@given(st.floats(1e-3, 30), st.floats(0, 40))
def test_gaussian_delta_is_a_probability(mu, epsilon):
    assert 0 <= gaussian_delta(mu, epsilon) <= 1
