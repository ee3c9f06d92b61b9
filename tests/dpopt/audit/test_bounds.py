# SPDX-License-Identifier: Apache-2.0
"""What the bounds say: closed forms, their caps, how sharp they are, and odd inputs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import nct, norm

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
    poisson_steps,
    steinke,
)
from dpopt.audit.bounds.gaussian import least_noncentrality
from tests.support.dpopt.draws import gaussian, mu_of

DELTA = 1e-5
WHOLE = {
    "steinke": steinke,
    "fdp_one_run": fdp_one_run,
    "order_statistics": order_statistics,
    "clopper_pearson": clopper_pearson,
    "gdp_threshold": gdp_threshold,
    "full_signal": full_signal,
    "gdp_scores": gdp_scores,
}


def perfect(m):
    included = np.arange(m) % 4 < 2  # both coins among the even and the odd records
    return Evidence(included + 1e-3 * np.arange(m) / m, included, "dirac", True, 1e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_perfect_scores_reach_the_largest_possible(name):
    bound = WHOLE[name](perfect(400), DELTA)
    assert 0 < bound.epsilon <= bound.largest_possible
    if math.isfinite(bound.largest_possible):
        assert bound.epsilon == pytest.approx(bound.largest_possible, rel=1e-6)


@pytest.mark.parametrize(("m", "curve", "guesses"), [(1000, 5.55, 3.47), (5000, 7.98, 4.98)])
def test_caps_of_one_run(m, curve, guesses):
    assert steinke(perfect(m), DELTA).largest_possible == pytest.approx(guesses, abs=0.01)
    assert fdp_one_run(perfect(m), DELTA).largest_possible == pytest.approx(curve, abs=0.01)


def test_closed_forms():
    assert math.isclose((1 + math.exp(-steinke(perfect(400), 0.0).epsilon)) ** -40, 0.05, rel_tol=1e-4)
    advantage = 2 * 0.05 ** (1 / 400) - 1
    cap = order_statistics(perfect(400), DELTA, family=any_mechanism(DELTA)).epsilon
    assert cap == pytest.approx(2 * math.atanh(advantage), rel=1e-3)
    one = gaussian(np.random.default_rng(0), 500, 0.0)
    scores = np.where(one.included, 2.0, 0.0) + 1e-3 * (np.arange(500) % 2)
    told = full_signal(Evidence(scores, one.included, "dirac", True, 1.0), DELTA)
    sizes = one.num_included, 500 - one.num_included
    means = scores[one.included].mean() - scores[~one.included].mean()
    mu = means - norm.ppf(0.95) * math.sqrt(1 / sizes[0] + 1 / sizes[1])
    assert told.epsilon == pytest.approx(GAUSSIAN.epsilon(mu, DELTA), rel=1e-9)


@pytest.mark.parametrize(("degrees", "statistic"), [(3, 4.0), (50, 2.5), (998, 15.0), (4998, 60.0)])
def test_the_limit_of_a_noncentral_t(degrees, statistic):
    least = least_noncentrality(degrees, statistic, 0.05)
    assert nct.sf(statistic, degrees, least) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("family", [GAUSSIAN, any_mechanism(1e-3)], ids=lambda f: f.name)
def test_the_advantage_is_that_of_the_curve(family, strength):
    rates = np.linspace(1e-6, 1 - 1e-6, 4001)
    best = max(family.power(strength, rate) - rate for rate in rates)
    assert family.advantage(strength) == pytest.approx(best, abs=1e-3)


def test_steps_of_full_batches_are_one_gaussian():
    family = poisson_steps(1.0, 4)
    assert family.advantage(0.5) == pytest.approx(GAUSSIAN.advantage(1.0), rel=1e-6)
    assert family.epsilon(0.5, DELTA) == pytest.approx(GAUSSIAN.epsilon(1.0, DELTA), rel=1e-6)
    assert family.advantage(0.0) == 0.0 and family.epsilon(0.0, DELTA) == 0.0


MEDIANS = {  # (epsilon, m): the least median over 20 draws at delta 1e-5, and what the theory above leaves
    (4.0, 1000): {
        "full_signal": 3.3,
        "gdp_scores": 3.2,
        "order_statistics": 2.8,
        "fdp_one_run": 2.0,
        "steinke": 1.3,
    },
    (4.0, 5000): {"full_signal": 3.7, "gdp_scores": 3.65, "order_statistics": 3.3},
    (1.0, 5000): {"full_signal": 0.7, "order_statistics": 0.65},
    (8.0, 1000): {"full_signal": 7.1, "gdp_scores": 6.9, "order_statistics": 6.6},
}


@pytest.mark.parametrize(("epsilon", "m"), MEDIANS)
def test_power(epsilon, m):
    rng = np.random.default_rng(m)
    draws = [gaussian(rng, m, mu_of(epsilon)) for _ in range(20)]
    for name, least in MEDIANS[epsilon, m].items():
        seen = np.median([WHOLE[name](one, DELTA).epsilon for one in draws])
        assert seen >= least, (name, seen)


def single_steps(rng, m, noise, rate=0.01, steps=1000):
    included = rng.random(m) < rate
    return Evidence(rng.standard_normal(m) + included / noise, included, "dirac", True, None, steps, rate)


def test_power_over_single_steps():
    rng = np.random.default_rng(3)
    seen = [per_step(single_steps(rng, 300_000, 0.735), DELTA).epsilon for _ in range(5)]
    assert 3.2 <= np.median(seen) <= 4.01


def test_halved_noise_is_seen_where_no_record_of_it_is_trusted():
    rng = np.random.default_rng(4)
    true, told = 2 * mu_of(4.0), []
    for _ in range(5):
        included = rng.random(1000) < 0.5
        scores = 0.5 * (rng.standard_normal(1000) + true * included)  # recorded as of deviation 1
        one = Evidence(scores, included, "dirac", True, 1.0)
        told.append((gdp_scores(one, DELTA).epsilon, full_signal(one, DELTA).epsilon))
    unsuspecting = max(second for _, second in told)
    assert min(first for first, _ in told) > 6.0 and unsuspecting < 5.0
    assert per_step(single_steps(rng, 300_000, 0.735 / 2), DELTA).epsilon > 12.0


@given(
    st.lists(
        st.tuples(st.floats(allow_nan=False) | st.sampled_from([0.0, 1.0]), st.booleans()),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from(sorted(WHOLE)),
    st.sampled_from([0.0, 1e-5, 0.1]),
)
@settings(max_examples=150)
def test_any_evidence_has_a_bound(pairs, name, delta):
    scores, included = (list(column) for column in zip(*pairs, strict=True))
    with np.errstate(over="raise", invalid="raise"):
        bound = WHOLE[name](Evidence(scores, included, "odd", True, 1.0), delta)
    assert 0 <= bound.epsilon <= bound.largest_possible
    if name not in ("full_signal", "gdp_scores", "gdp_threshold"):
        assert math.isfinite(bound.epsilon) or delta == 0.0


@given(st.integers(0, 99), st.sampled_from(["steinke", "fdp_one_run", "order_statistics", "full_signal"]))
@settings(max_examples=30)
def test_more_right_is_never_less(turned, name):
    one = perfect(100)
    included = one.included.copy()
    included[turned] = not included[turned]
    other = Evidence(one.scores, included, "dirac", True, 1e-6)
    assert WHOLE[name](other, DELTA).epsilon <= WHOLE[name](one, DELTA).epsilon


@pytest.mark.parametrize("name", WHOLE)
def test_more_confidence_is_never_more(name):
    one = gaussian(np.random.default_rng(5), 300, 1.5)
    bounds = [WHOLE[name](one, DELTA, confidence).epsilon for confidence in (0.8, 0.95, 0.999)]
    assert bounds == sorted(bounds, reverse=True)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("steinke", {"confidence": 1.0}, "confidence"),
        ("steinke", {"share": 0.7}, "share"),
        ("steinke", {"delta": 2.0}, "delta"),
        ("fdp_one_run", {"family": poisson_steps(0.1, 10)}, "trade-off"),
        ("clopper_pearson", {"threshold": math.nan}, "threshold"),
    ],
)
def test_refusals(name, change, told):
    with pytest.raises(ValueError, match=told):
        WHOLE[name](perfect(40), **({"delta": DELTA} | change))


def test_evidence_of_the_wrong_kind_is_refused():
    rng = np.random.default_rng(6)
    steps = single_steps(rng, 100, 1.0, rate=0.5)
    for bound in WHOLE.values():
        with pytest.raises(ValueError, match="single steps"):
            bound(steps, DELTA)
    hanging = Evidence(steps.scores, steps.included, "loss")
    for name in ("order_statistics", "clopper_pearson", "gdp_threshold", "gdp_scores", "full_signal"):
        with pytest.raises(ValueError, match="independent"):
            WHOLE[name](hanging, DELTA)
    with pytest.raises(ValueError, match="noise_std"):
        full_signal(Evidence(steps.scores, steps.included, "x", True), DELTA)
    with pytest.raises(ValueError, match="single steps"):
        per_step(Evidence(steps.scores, steps.included, "x", True), DELTA)
