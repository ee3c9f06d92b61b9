# SPDX-License-Identifier: Apache-2.0
"""No lower bound lies above the truth more often than it says: 1,000 draws and more each, at the exact truth.

Significance 5 %; the counts allowed are exceeded by a true 5 % once in a thousand times.
"""

import numpy as np
import pytest

from dpopt.audit import (
    GAUSSIAN,
    Evidence,
    any_mechanism,
    clopper_pearson,
    fdp_one_run,
    full_signal,
    gdp_scores,
    gdp_threshold,
    order_statistics,
    per_step,
    steinke,
)
from dpopt.audit.bounds.lower_bound import num_right
from dpopt.audit.bounds.one_run import fdp_refuted, steinke_p_value
from tests.support.dpopt.draws import allowed, gaussian, mu_of, randomised_response, together

DRAWS = 1000
DELTA = 1e-5
FEW, MANY = 100, 400


def exceeding(bound, draw, truth):
    return sum(bound(draw()).epsilon > truth for _ in range(DRAWS))


CHEAP = {
    "order_statistics": lambda e: order_statistics(e, DELTA),
    "order_statistics, any mechanism": lambda e: order_statistics(e, DELTA, family=any_mechanism(DELTA)),
    "clopper_pearson": lambda e: clopper_pearson(e, DELTA),
    "clopper_pearson, fixed": lambda e: clopper_pearson(e, DELTA, threshold=0.5),
    "gdp_threshold": lambda e: gdp_threshold(e, DELTA),
    "full_signal": lambda e: full_signal(e, DELTA),
    "gdp_scores": lambda e: gdp_scores(e, DELTA),
}


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 4.0])
def test_guarantee_no_bound_exceeds_the_truth_too_often(name, epsilon):
    rng = np.random.default_rng([int(epsilon), len(name)])
    mu = mu_of(epsilon) if epsilon else 0.0
    assert exceeding(CHEAP[name], lambda: gaussian(rng, MANY, mu, noise=3.0), epsilon) <= allowed(DRAWS)


@pytest.mark.parametrize("name", ["order_statistics, any mechanism", "clopper_pearson"])
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 4.0])
def test_guarantee_no_bound_exceeds_the_truth_too_often_of_randomised_response(name, epsilon):
    rng = np.random.default_rng(len(name))
    bound = {
        "order_statistics, any mechanism": lambda e: order_statistics(e, 0.01, family=any_mechanism(0.01)),
        "clopper_pearson": lambda e: clopper_pearson(e, 0.01),
    }[name]
    draw = lambda: randomised_response(rng, MANY, epsilon, 0.01)  # noqa: E731
    assert exceeding(bound, draw, epsilon) <= allowed(DRAWS)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 4.0])
def test_guarantee_no_bound_exceeds_the_truth_too_often_by_guesses(epsilon, delta):
    """A bound lies above the truth only where the truth is refuted: see the test of the search below."""
    rng = np.random.default_rng(11)
    k, alarms = FEW // 4, [0, 0]
    for _ in range(DRAWS):
        right = num_right(randomised_response(rng, FEW, epsilon, delta), k, k)
        alarms[0] += steinke_p_value(FEW, 2 * k, right, epsilon, delta) <= 0.05
        alarms[1] += fdp_refuted(FEW, 2 * k, right, epsilon, 0.05, any_mechanism(delta))
    assert max(alarms) <= allowed(DRAWS)


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_guarantee_no_bound_exceeds_the_truth_too_often_by_a_gaussian_curve(epsilon):
    rng = np.random.default_rng(12)
    mu = mu_of(epsilon)
    right = [num_right(gaussian(rng, MANY, mu), 40, 40) for _ in range(DRAWS)]
    assert sum(fdp_refuted(MANY, 80, v, mu, 0.05) for v in right) <= allowed(DRAWS)


def test_guarantee_no_bound_exceeds_the_truth_too_often_over_single_steps():
    """The mu of one step is exceeded where the epsilon is: 1,000 draws of the one, and the other where it is close."""
    rng = np.random.default_rng(13)
    mu, alarms = 1 / 1.76, 0
    true = per_step_epsilon(mu)
    for _ in range(DRAWS):
        included = rng.random(MANY) < 0.1
        one = Evidence(rng.standard_normal(MANY) + mu * included, included, "dirac", True)
        if gdp_scores(one, DELTA).epsilon > GAUSSIAN.epsilon(mu, DELTA):
            alarms += 1
            composed = Evidence(one.scores, included, "dirac", True, None, 200, 0.1)
            assert per_step(composed, DELTA).epsilon > true
    assert alarms <= allowed(DRAWS)


def per_step_epsilon(mu):
    from accountants import calibrate

    return calibrate.epsilon(noise_multiplier=1 / mu, sampling_rate=0.1, steps=200, delta=DELTA)


def test_guarantee_one_run_bounds_hold_when_scores_hang_together():
    """Once in 17 runs nine coins of ten are told. Bounds that need independence are wrong there, and refuse."""
    mu, chance, told = mu_of(4.0), 0.06, 2.2
    losses = np.linspace(0.0, told, 200)
    own = chance * (np.exp(told) - np.exp(losses)) / (1 + np.exp(told))
    from accountants.dominating_pairs.gaussian import gaussian_delta

    assert all(
        own[i] <= gaussian_delta(mu, losses[i]) for i in range(200)
    )  # it is as private as the Gaussian
    rng = np.random.default_rng(14)
    draws = [together(rng, MANY, chance, told) for _ in range(2 * DRAWS)]
    right = [num_right(one, 20, 20) for one in draws]
    assert sum(fdp_refuted(MANY, 40, v, mu, 0.05) for v in right) <= allowed(2 * DRAWS)
    assert sum(steinke_p_value(MANY, 40, v, 4.0, DELTA) <= 0.05 for v in right) <= allowed(2 * DRAWS)
    wrong = [
        order_statistics(Evidence(one.scores, one.included, "x", independent=True), DELTA, 0.99).epsilon > 4.0
        for one in draws
    ]
    assert sum(wrong) > 2 * allowed(2 * DRAWS, 0.01)
    with pytest.raises(ValueError, match="independent"):
        order_statistics(draws[0], DELTA)


@pytest.mark.parametrize("right", [30, 41, 47, 50])
def test_guarantee_a_bound_lies_above_the_truth_only_where_that_is_refuted(right):
    """On both sides of the bound, the test that it is made of decides as it says."""
    included = np.arange(500) < 250
    scores = np.where(included, 1.0, -1.0)
    wrong = 50 - right  # of the 25 + 25 guessed, so many are turned
    included[:wrong] = False
    one = Evidence(scores - 1e-4 * np.arange(500) * np.sign(scores), included, "made")
    bound = steinke(one, DELTA)
    assert bound.observed.startswith(f"{right} of 50")
    if bound.epsilon > 0:
        assert steinke_p_value(500, 50, right, bound.epsilon, DELTA) <= 0.05
    assert steinke_p_value(500, 50, right, bound.epsilon + 1e-4, DELTA) > 0.05
    curve = fdp_one_run(one, DELTA)
    if curve.epsilon > 0:
        assert fdp_refuted(500, 50, right, mu_of(curve.epsilon) * (1 - 1e-4), 0.05)
        assert not fdp_refuted(500, 50, right, mu_of(curve.epsilon) * (1 + 1e-4), 0.05)
