# SPDX-License-Identifier: Apache-2.0
import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import (
    ADD_REMOVE,
    REPLACE,
    Curve,
    Gaussian,
    PoissonSampled,
    Repeated,
    TruncatedPoisson,
    accountant,
    group,
)
from accountants.dominating_pairs.feedback_step import shifted_delta
from accountants.dominating_pairs.gaussian import gaussian_delta, gaussian_epsilon
from accountants.dominating_pairs.sampled_step import GROUP, Step
from tests.support.accountants.conformance import QUICK
from tests.support.accountants.mixtures import hockey, poisson

NAMES = ("pld", "prv", "rdp", "zcdp")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_guarantee_group_is_never_below_the_exact_group(name, size):
    """Of Gaussians, whose group is a Gaussian at distance `size`; exact for those who know."""
    one = accountant(name).curve(Repeated(Gaussian(12.0), 9))
    truth = gaussian_epsilon(size * 3 / 12.0, 1e-5)
    found = group(one, size).epsilon(1e-5)
    assert found >= truth * (1 - 1e-9)
    if name in ("pld", "prv"):
        assert found == pytest.approx(truth, rel=1e-8)
        assert group(one, size).delta(1.0) == pytest.approx(gaussian_delta(size * 3 / 12.0, 1.0), rel=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [2, 3])
def test_guarantee_group_covers_records_sampled_one_by_one(name, size):
    """Each of the group draws its own coin: enumerated, in both directions."""
    rate, sigma = 0.2, 1.0
    curve = group(accountant(name).curve(PoissonSampled(rate, Gaussian(sigma))), size)
    whole, others = poisson((1.0,) * size, rate), poisson((), rate)
    for epsilon in (0.0, 0.5, 1.5, 4.0):
        truth = max(hockey(whole, others, sigma, epsilon), hockey(others, whole, sigma, epsilon))
        assert curve.delta(epsilon) >= truth - 1e-7


@pytest.mark.parametrize(("size", "truth"), [(1, 1.82824), (2, 3.979), (4, 8.899), (8, 20.90)])
def test_groups_of_sampled_records_are_tight(size, truth):
    """dp_accounting's mixture of Gaussians, to 4 digits; by single records 1, 4.231, 11.80 for 1, 2, 4 of them."""
    curve = accountant("pld").curve(Repeated(PoissonSampled(0.01, Gaussian(1.0)), 1000))
    bound = group(curve, size).bound(1e-5)
    assert bound.epsilon == pytest.approx(truth, rel=3e-4)
    assert bound.method == f"pld, group of {size}"
    assert group(curve, size).delta(bound.epsilon) == pytest.approx(1e-5, rel=0.01)
    assert group(accountant("prv").curve(Repeated(PoissonSampled(0.01, Gaussian(1.0)), 1000)), 4).bound(
        1e-5
    ).epsilon == pytest.approx(8.899, rel=3e-4)


def test_generic_conversion_where_nothing_better_is_known():
    event = Repeated(PoissonSampled(0.01, Gaussian(1.0)), 1000)
    curve = accountant("pld", REPLACE).curve(event)
    one = curve.epsilon(1e-6)
    assert 2 * curve.epsilon(5e-6) < group(curve, 2).epsilon(1e-5) < 2 * one * 1.5


@pytest.mark.parametrize(
    ("size", "rate", "sigma"), [(2, 0.3, 1.0), (3, 0.05, 0.8), (5, 0.5, 4.0), (64, 0.01, 9.0)]
)
def test_guarantee_the_pair_of_a_group_in_many_digits(size, rate, sigma):
    """H(e) of the binomial mixture against the Gaussian, in both directions, by bisection in 40 digits."""
    exact = mpmath.MPContext()
    exact.dps = 40
    s, q = exact.mpf(sigma), exact.mpf(rate)
    w = [exact.binomial(size, j) * q**j * (1 - q) ** (size - j) for j in range(size + 1)]

    def ratio(x):
        return exact.fsum(w[j] * exact.exp((j * x - exact.mpf(j) ** 2 / 2) / s**2) for j in range(size + 1))

    def at(value):
        low, high = -400 * s, exact.mpf(400 * size)
        for _ in range(140):
            middle = (low + high) / 2
            low, high = (middle, high) if ratio(middle) < value else (low, middle)
        return low

    for epsilon in (0.0, 0.01, 0.7, 3.0):
        e = exact.exp(exact.mpf(epsilon))
        x = at(e)
        joins = exact.fsum(w[j] * exact.ncdf((j - x) / s) for j in range(size + 1)) - e * exact.ncdf(-x / s)
        leaves = exact.zero
        if 1 / e > w[0]:
            x = at(1 / e)
            leaves = exact.ncdf(x / s) - e * exact.fsum(
                w[j] * exact.ncdf((x - j) / s) for j in range(size + 1)
            )
        truth = max(joins, leaves)
        mine = shifted_delta(Step(sigma, rate, GROUP, size=size), epsilon)
        assert truth <= mine <= truth * (1 + 1e-6) + 1e-14


def test_two_steps_of_a_group_are_the_integral():
    rate, sigma, size = 0.2, 1.5, 3
    x, pace = np.linspace(-12 * sigma, 14 * sigma, 3001, retstep=True)
    base = np.exp(-x * x / 2 / sigma**2) / sigma / math.sqrt(2 * math.pi) * pace
    w = [math.comb(size, j) * rate**j * (1 - rate) ** (size - j) for j in range(size + 1)]
    ratio = sum(w[j] * np.exp((j * x - j * j / 2) / sigma**2) for j in range(size + 1))
    both, weight = np.multiply.outer(ratio, ratio), np.multiply.outer(base, base)
    curve = group(accountant("pld").curve(Repeated(PoissonSampled(rate, Gaussian(sigma)), 2)), size)
    for epsilon in (0.2, 1.0, 3.0):
        joins = float(np.sum(weight * np.maximum(both - math.exp(epsilon), 0)))
        leaves = float(np.sum(weight * np.maximum(1 - math.exp(epsilon) * both, 0)))
        assert max(joins, leaves) * (1 - 1e-4) <= curve.delta(epsilon) <= 1.01 * max(joins, leaves)


@pytest.mark.parametrize("seed", range(4))
def test_contributions_of_a_group_in_any_directions_are_dominated(seed):
    """Three records with contributions anywhere in the unit disc, each sampled by itself: both directions."""
    rng = np.random.default_rng(seed)
    rate, sigma, size = 0.4, 1.1, 3
    x = np.linspace(-9, 9, 361)
    plane, cell = np.meshgrid(x, x), (x[1] - x[0]) ** 2
    angles, lengths = rng.uniform(0, 2 * math.pi, size), rng.uniform(0.4, 1, size)
    centres = np.stack([lengths * np.cos(angles), lengths * np.sin(angles)], axis=1)
    mixed, alone = np.zeros_like(plane[0]), None
    for chosen in np.ndindex((2,) * size):
        weight = math.prod(rate if c else 1 - rate for c in chosen)
        a, b = np.array(chosen) @ centres
        bump = np.exp(-((plane[0] - a) ** 2 + (plane[1] - b) ** 2) / 2 / sigma**2) / (2 * math.pi * sigma**2)
        alone = bump if not any(chosen) else alone
        mixed += weight * bump
    for epsilon in (0.0, 0.3, 1.0):
        bound = shifted_delta(Step(sigma, rate, GROUP, size=size), epsilon) + 1e-5
        for p, r in ((mixed, alone), (alone, mixed)):
            assert float(np.sum(np.maximum(p - math.exp(epsilon) * r, 0))) * cell <= bound


@QUICK
@given(st.floats(0.7, 6), st.sampled_from([0.005, 0.05, 0.4]), st.integers(1, 60), st.integers(1, 6))
def test_groups_of_sampled_records_are_monotone(sigma, rate, count, size):
    def price(sigma, rate, size):
        return group(
            accountant("pld").curve(Repeated(PoissonSampled(rate, Gaussian(sigma)), count)), size
        ).epsilon(1e-5)

    here = price(sigma, rate, size) * (1 - 1e-3)
    assert price(sigma, rate, size + 1) >= here
    assert price(sigma / 1.2, rate, size) >= here
    assert price(sigma, min(1.0, rate * 1.3), size) >= here
    assert here <= group(accountant("pld").curve(Repeated(Gaussian(sigma), count)), size).epsilon(1e-5)


@QUICK
@given(st.floats(3, 20), st.integers(1, 5), st.sampled_from(["rdp", "zcdp"]), st.sampled_from([1e-3, 1e-6]))
def test_group_is_monotone_and_a_curve(sigma, size, name, delta):
    one = accountant(name).curve(Repeated(Gaussian(sigma), 4))
    curve = group(one, size)
    assert isinstance(curve, Curve)
    assert curve.epsilon(delta) >= one.epsilon(delta) * (1 - 1e-9)
    assert group(one, size + 1).epsilon(delta) >= curve.epsilon(delta) * (1 - 1e-9)
    assert (curve + curve).epsilon(delta) == (curve * 2).epsilon(delta) >= curve.epsilon(delta)
    assert curve.bound(delta).method == f"{name}, group of {size}"


def test_two_records_of_a_pair_are_a_replacement_of_full_batches():
    pair = group(accountant("pld", ADD_REMOVE).curve(Gaussian(4.0)), 2)
    swap = accountant("pld", REPLACE).curve(Gaussian(4.0))
    assert pair.epsilon(1e-6) == pytest.approx(swap.epsilon(1e-6), rel=1e-9)


def test_a_slip_grows_with_the_group():
    curve = accountant("rdp").curve(TruncatedPoisson(0.1, 25, 100, Gaussian(2.0)))
    assert group(curve, 3).delta(50.0) == 1.0
    assert group(curve, 3).delta(6.0) >= curve.slip * (1 + math.exp(2) + math.exp(4)) * 0.999
    assert math.isinf(group(curve, 3).epsilon(curve.slip))


def test_refusals():
    curve = accountant("rdp").curve(Gaussian(1.0))
    for size in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"size must be an integer >= 1; got .*pass the most records"):
            group(curve, size)
    with pytest.raises(ValueError, match="groups of one size"):
        group(curve, 2) + group(curve, 3)
