# SPDX-License-Identifier: Apache-2.0
"""Where other libraries raise, hang, overflow or err: here a right answer, or a refusal that says what to do.

Each case names the library and what it does (opacus 1.6.0, dp-accounting 0.6.0, prv-accountant 0.2.0, measured).
Right means: above a certified lower bound and near the tightest upper one.
"""

import math
import time

import pytest

from accountants import Composed, Gaussian, PoissonSampled, Repeated, accountant, best, calibrate
from accountants.floor import lower_epsilon
from tests.support.accountants.reference import DIGITS, ROWS

NAMES = ("rdp", "prv", "pld")


def steps(sigma, q, count):
    return Repeated(PoissonSampled(q, Gaussian(sigma)), count)


CASES = {
    "top order 63 binds: opacus RDP 0.251": (10, 1e-5, 100_000, 1e-9, 0.00132646),
    "top order 1024 binds: dp-accounting RDP 0.0126": (10, 1e-5, 100_000, 1e-9, 0.00132646),
    "bottom order 1.1 binds: opacus RDP 226.5": (0.1, 0.001, 100, 1e-5, 156.864),
    "the conversion is loose: opacus RDP 0.744": (1, 1e-5, 1, 1e-9, 0.000438903),
    "fractional orders do not converge and are dropped: dp-accounting RDP 78.7": (
        2,
        0.5,
        1000,
        1e-5,
        67.1684,
    ),
    "rounding dominates a small epsilon: dp-accounting PLD 0.0346": (1, 1e-5, 100_000, 1e-7, 0.0156211),
    "truncated tails become mass at infinity: dp-accounting PLD 8.59": (1, 0.01, 1000, 1e-14, 4.54370),
    "a finer grid lies below the truth: dp-accounting PLD at 1e-5 4.534": (1, 0.01, 1000, 1e-14, 4.54370),
    "tens of seconds: dp-accounting PLD": (0.1, 0.001, 100, 1e-5, 156.864),
    "means differ, raises: prv-accountant": (0.5, 0.1, 100, 1e-5, 31.3710),
    "the certified low end is above the truth: prv-accountant 69.823": (0.3, 0.01, 1000, 1e-5, 69.8157),
    "an absolute error of 0.01, a negative estimate: prv-accountant": (1, 1e-5, 1, 1e-9, 0.000438903),
    "delta 1e-14 refused: prv-accountant and opacus PRV": (1, 0.01, 1000, 1e-14, 4.54370),
    "five per cent below a certified lower bound: opacus PRV 22.578": (0.5, 0.001, 100_000, 1e-12, 23.8559),
    "inf after a minute: opacus PRV; out of memory: prv-accountant": (0.5, 1, 1000, 1e-5, 2268.768),
    "out of memory: opacus PRV and prv-accountant": (1, 0.01, 1_000_000, 1e-6, 145.497),
    "the central limit is no bound: opacus GDP 0.117": (0.5, 1e-5, 100_000, 1e-9, 2.1474),
    "the central limit is no bound: opacus GDP 3.44": (0.5, 0.001, 10_000, 1e-6, 6.34611),
}


@pytest.mark.parametrize("case", CASES)
def test_a_right_answer(case):
    sigma, q, count, delta, truth = CASES[case]
    started = time.perf_counter()
    bound = best(steps(sigma, q, count), delta)
    assert time.perf_counter() - started < 10
    assert truth * (1 - DIGITS) <= bound.epsilon <= truth * 1.001
    assert accountant("rdp").curve(steps(sigma, q, count)).epsilon(delta) >= truth * (1 - DIGITS)


def test_the_central_limit_is_refused():
    with pytest.raises(ValueError, match=r"accountant must be one of .*; got 'gdp'; choose"):
        accountant("gdp")


@pytest.mark.parametrize(
    ("name", "sigma", "delta"),
    [("prv", 0.05, 1e-3), ("prv", 200.0, 1e-3)]
    + [
        (name, sigma, delta)
        for name in ("rdp", "pld")
        for sigma in (1e-3, 0.02, 200.0)
        for delta in (1e-3, 1e-12)
    ],
)
def test_no_negative_epsilon_no_nan_no_overflow(name, sigma, delta):
    """opacus PR #844: a negative epsilon for much noise; overflow for little; log(1 - q) at q = 1."""
    for q in (1e-9, 0.5, 1.0):
        epsilon = accountant(name).curve(steps(sigma, q, 3)).epsilon(delta)
        assert epsilon >= 0
        assert math.isfinite(epsilon)
        assert lower_epsilon(steps(sigma, q, 3), delta) <= epsilon * (1 + 1e-9)


@pytest.mark.parametrize(
    ("epsilon", "delta", "q", "count", "least"),
    [
        (0.05, 1e-6, 0.01, 1000, 21.99),  # opacus: "budget too low"; prv-accountant: not converged, or 23.17
        (0.005, 1e-6, 0.001, 1000, 18.31),  # dp-accounting RDP: 31,616; prv-accountant: more than a minute
        (2.0, 1e-5, 0.01, 1000, 0.9591),  # opacus stops 0.01 below the target
    ],
)
def test_small_budgets_are_calibrated(epsilon, delta, q, count, least):
    started = time.perf_counter()
    found = calibrate.noise_multiplier(
        epsilon=epsilon, delta=delta, sampling_rate=q, steps=count, accountant="pld"
    )
    assert time.perf_counter() - started < 5
    assert least * 0.999 <= found <= least * 1.005


@pytest.mark.parametrize("name", ["rdp", "pld"])
def test_epsilon_1000_is_calibrated_in_seconds(name):
    """dp-accounting PLD, prv-accountant: over a minute; opacus PRV: hangs."""
    started = time.perf_counter()
    given = {"delta": 1e-5, "sampling_rate": 0.01, "steps": 100, "accountant": name}
    found = calibrate.noise_multiplier(epsilon=1000.0, **given)
    assert time.perf_counter() - started < 5
    price = calibrate.epsilon(noise_multiplier=found, **given)
    assert 950 < price <= 1000


@pytest.mark.parametrize("name", NAMES)
def test_counts_multiply(name):
    """dp-accounting at HEAD: a count is ignored for one mechanism when self-composed, not in a loop."""
    event = PoissonSampled(0.05, Gaussian(1.5))
    looped = Composed(tuple(event for _ in range(40)))
    nested = Repeated(Repeated(event, 8), 5)
    prices = [accountant(name).curve(each).epsilon(1e-5) for each in (looped, nested, Repeated(event, 40))]
    assert prices == [prices[0]] * 3
    assert prices[0] > 1.5 * accountant(name).curve(event).epsilon(1e-5)


def test_much_plain_noise_beside_sampled_steps():
    """Our own, found by the lower bound: rounding errors at a large loss sent PLD back to the Renyi bound."""
    event = Composed(
        (
            steps(4.338675317238219, 0.5, 129),
            steps(1.490073401441641, 1.0, 68),
            steps(6.635534659889328, 0.5, 25),
        )
    )
    bound = accountant("pld").curve(event).bound(1e-7)
    assert bound.method == "pld"
    assert bound.epsilon <= 1.001 * lower_epsilon(event, 1e-7)


@pytest.mark.parametrize("delta", [1e-5, 1e-9])
def test_a_heavy_bulk_far_below_epsilon_does_not_overflow(delta):
    """Our own: sums of untilted masses overflowed, with a warning, where sigma is small."""
    for q in (0.001, 0.5, 0.1):
        event = steps(0.3, q, 100)
        assert lower_epsilon(event, delta) <= accountant("pld").curve(event).epsilon(delta) < math.inf


def test_rows_are_cited_by_their_numbers():
    known = {(row.sigma, row.q, row.steps, row.delta): row.tight for row in ROWS}
    for sigma, q, count, delta, truth in CASES.values():
        assert known.get((sigma, q, count, delta), truth) == truth
