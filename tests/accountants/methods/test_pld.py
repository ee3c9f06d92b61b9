# SPDX-License-Identifier: Apache-2.0
import math
import warnings

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import Composed, Gaussian, PoissonSampled, Repeated, accountant, leaves
from accountants.dominating_pairs.connect_the_dots import dots, reach
from accountants.dominating_pairs.sampled_step import Step
from accountants.methods import pld as pld_module
from accountants.privacy_loss.direction import Direction
from accountants.privacy_loss.fft_composition import Window, compose
from tests.support.accountants.conformance import QUICK, AccountantConformance, counts, deltas, rates, sigmas
from tests.support.accountants.lower import lower_epsilon
from tests.support.accountants.reference import DIGITS, ROWS

PLD, RDP = accountant("pld"), accountant("rdp")
EXACT = mpmath.MPContext()
EXACT.dps = 40


class TestPLD(AccountantConformance):
    rule = PLD
    slack = (5e-4, 1e-9)

    def test_is_not_adaptive(self):
        assert not self.rule.adaptive


@pytest.mark.parametrize("number", range(1, 21))
def test_tight(number):
    row = ROWS[number - 1]
    bound = PLD.curve(row.event).bound(row.delta)
    assert bound.method == ("closed form" if number in (6, 8, 20) else "pld")
    assert row.tight * (1 - (DIGITS if bound.method == "closed form" else 0)) <= bound.epsilon
    assert bound.epsilon <= row.tight * 1.0005
    assert not any("conjecture" in text or "counterexample" in text for text in bound.assumptions)


@pytest.mark.parametrize("number", [1, 2, 3, 9, 11, 12, 15, 16, 19])
def test_the_truth_lies_between_the_bounds(number):
    row = ROWS[number - 1]
    upper = PLD.curve(row.event).epsilon(row.delta)
    lower = lower_epsilon(leaves(row.event), upper, row.delta)
    assert row.tight * 0.995 <= lower <= row.tight <= upper


@QUICK
@given(st.lists(st.tuples(sigmas, rates, counts), min_size=1, max_size=3), deltas)
def test_never_below_the_lower_bound(parts, delta):
    event = Composed(tuple(Repeated(PoissonSampled(q, Gaussian(s)), n) for s, q, n in parts))
    bound = PLD.curve(event).bound(delta)
    if bound.method == "pld":
        assert lower_epsilon(leaves(event), bound.epsilon, delta, error=0.02) <= bound.epsilon
    assert bound.epsilon <= RDP.curve(event).epsilon(delta) * 1.0005


@QUICK
@given(sigmas, rates, counts, deltas)
def test_delta_and_epsilon_agree(sigma, q, n, delta):
    curve = PLD.curve(Repeated(PoissonSampled(q, Gaussian(sigma)), n))
    epsilon = curve.epsilon(delta)
    if epsilon > 0:
        assert 0.99 * delta <= curve.delta(epsilon) <= 1.01 * delta


def _curve(sigma, q, removed, e):
    """H(e) of one step, in many digits."""
    s, q, e = (EXACT.mpf(float(x)) for x in (sigma, q, e))
    if not removed:
        return 1 - EXACT.exp(e) + EXACT.exp(e) * _curve(sigma, float(q), True, -e)
    inside = (EXACT.exp(e) - 1 + q) / q
    if inside <= 0:
        return 1 - EXACT.exp(e)
    x = s * s * EXACT.log(inside) + EXACT.mpf(1) / 2
    above = (1 - q) * EXACT.ncdf(-x / s) + q * EXACT.ncdf((1 - x) / s)
    return above - EXACT.exp(e) * EXACT.ncdf(-x / s)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize(
    ("sigma", "q", "mesh"),
    [(1, 0.01, 2e-3), (0.5, 0.3, 0.02), (10, 1e-5, 3e-8), (3, 1.0, 0.01), (0.2, 0.95, 0.2), (40, 0.5, 1e-3)],
)
def test_one_step_is_pessimistic(sigma, q, mesh, removed):
    step, mesh = Step(sigma, q), float(np.float32(mesh))
    law = dots(step, removed, mesh, reach([step], removed, 1e-12)[0])
    losses = mesh * (law.first + np.arange(len(law.masses)))
    assert law.masses.min() >= 0
    assert 1 <= law.masses.sum() + law.infinite <= 1 + 1e-13
    for i in range(1, len(losses), max(1, len(losses) // 15)):
        for e in (losses[i], losses[i] - mesh / 2):
            mine = law.infinite + EXACT.fsum(
                EXACT.mpf(float(p)) * -EXACT.expm1(EXACT.mpf(float(e)) - EXACT.mpf(float(x)))
                for p, x in zip(law.masses[i:], losses[i:], strict=True)
                if x > e
            )
            truth = _curve(sigma, q, removed, e)
            assert mine >= truth
            if e == losses[i] and e >= 0:
                assert mine <= truth * (1 + 1e-9) + 3e-12


@pytest.mark.parametrize("tilt", [0.0, 2.0])
def test_rounding_errors_of_the_transform_are_paid_for(tilt):
    mesh, size = float(np.float32(0.02)), 400
    law = dots(Step(1.0, 0.2), True, mesh, (-0.2, 3.0))
    laws = ((law, 7), (dots(Step(2.0, 0.1), True, mesh, (-0.2, 1.0)), 12))
    window = Window(mesh, -60, size, tilt, 3.0)
    tail, finer = compose(laws, window), compose(laws, window, np.longdouble)
    masses = [np.array([int(p * 2**200) for p in law.masses.tolist()], dtype=object) for law, _ in laws]
    exact, first = np.array([1], dtype=object), sum(law.first * n for law, n in laws)
    for p, (_, count) in zip(masses, laws, strict=True):
        for _ in range(count):
            exact = np.array(
                [x >> 200 for x in np.convolve(exact << 0 if len(exact) > 1 else exact * 2**200, p)],
                dtype=object,
            )
    circle = np.zeros(size)
    for i, mass in enumerate(exact):
        circle[(first + i) % size] += float(mass) / 2**200
    for loss, mass, noise in zip(tail.losses, tail.masses, tail.noise, strict=True):
        truth = (
            circle[round(loss / mesh) % size]
            if tilt == 0
            else float(exact[round(loss / mesh) - first]) / 2**200
        )
        assert truth * (1 - 1e-14) <= mass
        if tilt == 0:
            assert mass <= truth * (1 + 1e-12) + 2 * noise
    assert finer.noise_share(1.0) < tail.noise_share(1.0) < 1e-3


def test_answers_of_any_grid_are_upper_bounds():
    row = ROWS[0]
    for removed, least in ((True, row.tight), (False, 1.41666)):
        side = Direction.of(((Step(row.sigma, row.q), row.steps),), removed, row.delta)
        for mesh in (0.05, 0.004, 0.0005):
            for tilt in (0.0, 3.0, 9.0):
                found = side.tail(float(np.float32(mesh)), 1.0, tilt, 0.0, row.delta)
                assert found is not None
                tail = found[1]
                assert tail.epsilon(row.delta) >= least * (1 - DIGITS)
                assert tail.delta(least) >= row.delta * (1 - 1e-4)


def test_tiny_grids_are_looser_but_never_wrong(monkeypatch):
    from accountants.privacy_loss import direction

    row, event = ROWS[0], Repeated(PoissonSampled(0.01, Gaussian(1.0)), 1000)
    monkeypatch.setattr(direction, "MAX_POINTS", 1000)
    assert row.tight < pld_module._epsilon(((Step(1.0, 0.01), 1000),), 1e-5) < row.tight * 1.02
    monkeypatch.setattr(direction, "MAX_POINTS", 200)
    pld_module.pld_bound.cache_clear()
    bound = PLD.curve(event).bound(1e-5)
    pld_module.pld_bound.cache_clear()
    assert row.tight < bound.epsilon <= RDP.curve(event).epsilon(1e-5)


@pytest.mark.parametrize(
    ("event", "delta"),
    [
        (Repeated(PoissonSampled(0.5, Gaussian(0.02)), 3), 1e-5),
        (Repeated(PoissonSampled(0.5, Gaussian(1e-4)), 3), 1e-5),
        (Repeated(PoissonSampled(0.1, Gaussian(1.0)), 30), 1e-290),
    ],
)
def test_falls_back_to_renyi_and_says_so(event, delta):
    bound = PLD.curve(event).bound(delta)
    assert bound.method == "rdp"
    assert bound.epsilon == RDP.curve(event).epsilon(delta)


@pytest.mark.parametrize("sigma", [1e-200, 1e-9, 1e6])
def test_extreme_noise_ends(sigma):
    curve = PLD.curve(Repeated(PoissonSampled(0.1, Gaussian(sigma)), 100))
    assert (curve.epsilon(1e-6) < 1e-3) == (sigma > 1)
    assert (curve.epsilon(1e-6) > 1e9) == (sigma < 1)
    assert 0 <= curve.delta(1.0) <= 1


def _wandering(levels, repeats, rate):
    x = np.cumsum(np.random.default_rng(0).normal(0, 0.05, levels))
    v = (x - x.min()) / (x.max() - x.min())
    return Composed(
        tuple(Repeated(PoissonSampled(rate, Gaussian(float(s))), repeats) for s in 0.6 * (2 / 0.6) ** v)
    )


def test_many_distinct_noise_multipliers(monkeypatch):
    event = _wandering(500, 4, 0.01)
    truth = 4.40209  # dp_accounting's PLD accountant on a grid of 1e-4, and a second implementation
    assert truth * (1 - DIGITS) <= PLD.curve(event).epsilon(1e-5) <= truth * 1.002
    monkeypatch.setattr(pld_module, "MAX_DISTINCT", 200)
    pld_module.pld_bound.cache_clear()
    assert truth < PLD.curve(event).epsilon(1e-5) <= truth * 1.012
    pld_module.pld_bound.cache_clear()


@QUICK
@given(
    st.lists(st.tuples(sigmas, st.floats(0.001, 0.5)), min_size=2, max_size=6), st.sampled_from([0.001, 0.05])
)
def test_rounding_to_a_geometric_grid_is_pessimistic(pairs, ratio):
    rounded = pld_module._on_geometric_grid(dict.fromkeys([Step(s, q) for s, q in pairs], 3), ratio)
    assert sum(rounded.values()) == 3 * len(set(pairs))
    for s, q in pairs:
        assert any(
            s * math.exp(-ratio) * 0.999999 <= step.noise_multiplier <= s
            and q <= step.sampling_rate <= min(1, q * math.exp(ratio) * 1.000001)
            for step in rounded
        )


def test_equals_dp_accounting():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import dp_accounting
        from dp_accounting.pld import PLDAccountant

        theirs = PLDAccountant(value_discretization_interval=1e-3)
        parts = [(0.8, 0.02, 50), (1.5, 0.1, 40), (3.0, 1.0, 2)]
        for sigma, q, n in parts:
            step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
            theirs.compose(step if q < 1 else dp_accounting.GaussianDpEvent(sigma), n)
        expected = theirs.get_epsilon(1e-6)
    event = Composed(tuple(Repeated(PoissonSampled(q, Gaussian(s)), n) for s, q, n in parts))
    assert PLD.curve(event).epsilon(1e-6) == pytest.approx(expected, rel=5e-4)
