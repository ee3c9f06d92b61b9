# SPDX-License-Identifier: Apache-2.0
"""Settings at the ends of what numbers can hold: no accountant raises, warns, or forgets that it is an upper bound."""

import math
import random

import pytest

from accountants import (
    ADD_REMOVE,
    RELATIONS,
    Composed,
    Gaussian,
    NonPrivate,
    PoissonSampled,
    Repeated,
    accountant,
)
from accountants.floor import lower_epsilon
from accountants.registry import ACCOUNTANTS

NAMES = sorted(ACCOUNTANTS)
NOISES = (5e-324, 1e-160, 1e-10, 0.01, 0.5, 1.0, 30.0, 1e10, 1e160, 1e300)
RATES = (5e-324, 1e-300, 1e-7, 0.01, 0.5, 1 - 1e-12, 1.0)
COUNTS = (1, 2, 1000, 10**7, 10**18, 10**300)
DELTAS = (5e-324, 1e-300, 1e-14, 1e-5, 0.5, 0.999999)


def drawn(seed):
    """Some of all combinations, with other mechanisms beside them now and then."""
    rng = random.Random(seed)
    event = Repeated(PoissonSampled(rng.choice(RATES), Gaussian(rng.choice(NOISES))), rng.choice(COUNTS))
    if rng.random() < 0.3:
        event = Composed((event, Repeated(PoissonSampled(0.02, Gaussian(2.0)), 30), Gaussian(5.0)))
    return event, rng.choice(DELTAS), rng.choice(sorted(RELATIONS))


@pytest.mark.parametrize("seed", range(30))
def test_nothing_raises_or_warns_and_nothing_is_above_renyi(seed):
    event, delta, relation = drawn(seed)
    prices = {}
    for name in NAMES:
        bound = accountant(name, relation).curve(event).bound(delta)
        assert bound.epsilon >= 0
        prices[name] = bound.epsilon
        for epsilon in (1e-9, 1e6, math.inf):
            assert 0 <= accountant(name, relation).curve(event).delta(epsilon) <= 1
    assert max(prices["pld"], prices["prv"]) <= prices["rdp"] * (1 + 1e-12)
    if relation == ADD_REMOVE:
        assert lower_epsilon(event, delta) <= min(prices.values()) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "ratio"),
    [
        (1.0, 0.01, 10**9, 1.01),
        (0.5, 0.5, 10**7, 1.01),
        (0.05, 0.5, 10_000, 1.05),
        (0.3, 0.9, 10**6, 1.01),
        (1.0, 0.01, 10**18, 1.001),
    ],
)
def test_epsilons_beyond_any_use_are_finite(sigma, q, steps, ratio):
    """The mean of the loss is steps times the divergence of order 1, less than what delta asks for."""
    event = Repeated(PoissonSampled(q, Gaussian(sigma)), steps)
    rdp = accountant("rdp").curve(event)
    for name in ("pld", "prv"):
        assert rdp.values[0] / ratio <= accountant(name).curve(event).epsilon(1e-5) <= rdp.epsilon(1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_noise_is_infinite_whatever_it_stands_beside(name):
    for event in (NonPrivate(), Gaussian(0.0), Repeated(PoissonSampled(1e-7, Gaussian(0.0)), 10**18)):
        curve = accountant(name).curve(Composed((Repeated(PoissonSampled(0.01, Gaussian(1.0)), 10), event)))
        assert math.isinf(curve.epsilon(1e-5))
        assert curve.delta(1e6) == 1


def test_a_step_that_gives_a_record_away_within_delta_costs_delta_only():
    """Once the Renyi bound of the hopeless step, 5763, stood for the whole."""
    rest = Repeated(PoissonSampled(0.01, Gaussian(1.0)), 500)
    event = Composed((Repeated(PoissonSampled(4e-9, Gaussian(0.008)), 2), rest))
    found = accountant("pld").curve(event).bound(1e-5)
    assert found.method == "pld"
    alone = accountant("pld").curve(rest).epsilon(1e-5)
    assert alone <= found.epsilon <= alone * 1.01


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "epsilon", "truth"),
    [(1.0, 1e-5, 10**5, 0.1, 9.7e-20), (1.0, 0.01, 1000, 1.82824, 1e-5)],
)
def test_delta_sees_a_heavy_tail(sigma, q, steps, epsilon, truth):
    """One large loss is likelier than many small ones: the Renyi bound, 0.0021 in the first case, does not see it."""
    found = accountant("pld").curve(Repeated(PoissonSampled(q, Gaussian(sigma)), steps)).delta(epsilon)
    assert truth * (1 - 1e-3) <= found <= truth * 1.15


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-6, 1e-4, 1e-3, 0.01])
def test_delta_at_tiny_epsilon_is_near_the_integral(epsilon):
    from tests.support.accountants.oracle import composed

    for steps in (((1.0, 0.1),) * 2, ((20.0, 1e-4),) * 2, ((100.0, 0.5),) * 2):
        truth, error = max(composed(steps, removed, epsilon) for removed in (True, False))
        event = Composed(tuple(PoissonSampled(q, Gaussian(s)) for s, q in steps))
        found = accountant("pld").curve(event).delta(epsilon)
        assert truth - error <= found
        if truth > 1e-10:
            assert found <= truth * 1.005 + error
