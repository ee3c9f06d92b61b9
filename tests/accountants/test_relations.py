# SPDX-License-Identifier: Apache-2.0
"""Prices by sampler and relation, against mechanisms on a few records written out in full."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr

from accountants import (
    ADD_REMOVE,
    BY_POSITION,
    BY_RECORD,
    RELATIONS,
    REPLACE,
    ZERO_OUT,
    Composed,
    FixedSize,
    Gaussian,
    NonPrivate,
    OncePerEpoch,
    PoissonSampled,
    Repeated,
    TruncatedPoisson,
    UnpricedEvent,
    accountant,
    best,
    budget_filter,
    calibrate,
    from_dict,
    to_dict,
)
from tests.support.accountants.conformance import QUICK
from tests.support.accountants.mixtures import fixed_size, hockey, poisson, truncated

NAMES = ("pld", "prv", "rdp", "zcdp")
EPSILONS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)
QUADRATURE = 1e-7
OTHERS = ((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0), (1.0, -1.0, 0.3), (0.0, 0.0, 0.0))


def neighbours(relation, others):
    """Contributions of all records, for both of two neighbours; the record in question comes first."""
    if relation == ADD_REMOVE:
        return [((1.0, *others), others)]
    if relation == ZERO_OUT:
        return [((1.0, *others), (0.0, *others))]
    return [((1.0, *others), (-1.0, *others)), ((1.0, *others), (0.2, *others))]


def charged(name, relation, event, epsilon):
    return accountant(name, relation).curve(event).delta(epsilon)


def dearest(relation, draw, sigma, epsilon):
    """The largest hockey-stick divergence over neighbours, in both directions."""
    pairs = [pair for others in OTHERS for pair in neighbours(relation, others)]
    pairs += [pair[::-1] for pair in pairs]
    return max(hockey(draw(a), draw(b), sigma, epsilon) for a, b in pairs)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(("rate", "sigma"), [(0.3, 1.0), (0.05, 0.6)])
def test_guarantee_poisson_covers_the_enumerated_mechanism(relation, rate, sigma):
    event = PoissonSampled(rate, Gaussian(sigma))
    for epsilon in EPSILONS:
        truth = dearest(relation, lambda x: poisson(x, rate), sigma, epsilon)
        for name in NAMES:
            assert charged(name, relation, event, epsilon) >= truth - QUADRATURE
        assert (
            charged("pld", relation, event, epsilon) <= truth * 1.01 + 1e-6
        )  # the dearest records are among them


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(("rate", "most", "sigma"), [(0.3, 2, 1.0), (0.5, 1, 1.0), (0.1, 1, 0.7)])
def test_guarantee_truncated_poisson_covers_the_enumerated_mechanism(relation, rate, most, sigma):
    event = TruncatedPoisson(rate, most, 4, Gaussian(sigma))
    for epsilon in EPSILONS:
        truth = dearest(relation, lambda x: truncated(x, rate, most), sigma, epsilon)
        for name in NAMES:
            assert charged(name, relation, event, epsilon) >= truth - QUADRATURE


@pytest.mark.parametrize("relation", RELATIONS)
def test_truncation_priced_without_its_slip_would_be_wrong(relation):
    rate, most, sigma, epsilon = 0.5, 1, 0.5, 4.0
    truth = dearest(relation, lambda x: truncated(x, rate, most), sigma, epsilon)
    naive = charged("pld", relation, PoissonSampled(rate, Gaussian(sigma)), epsilon)
    whole = charged("pld", relation, TruncatedPoisson(rate, most, 4, Gaussian(sigma)), epsilon)
    if relation == ADD_REMOVE:
        assert naive < 0.7 * truth
    assert truth <= whole


@pytest.mark.parametrize("relation", [ZERO_OUT, REPLACE])
@pytest.mark.parametrize(("size", "sigma"), [(1, 1.0), (2, 1.5), (3, 0.7)])
def test_guarantee_fixed_size_covers_the_enumerated_mechanism(relation, size, sigma):
    event = FixedSize(size, 4, Gaussian(sigma))
    for epsilon in EPSILONS:
        truth = dearest(relation, lambda x: fixed_size(x, size), sigma, epsilon)
        for name in NAMES:
            assert charged(name, relation, event, epsilon) >= truth - QUADRATURE
        if relation == REPLACE:
            assert charged("pld", relation, event, epsilon) <= truth * 1.01 + 1e-6


def test_a_fixed_size_priced_as_poisson_would_be_wrong():
    truth = dearest(REPLACE, lambda x: fixed_size(x, 1), 1.0, 1.0)
    assert charged("pld", REPLACE, PoissonSampled(0.25, Gaussian(1.0)), 1.0) < truth - 0.01


def shuffle_epsilon(sigma, steps, delta):
    """A lower bound for one shuffled epoch: the event that some output exceeds c (Chua et al. 2024)."""
    c = np.linspace(0, 12, 4001)
    p = 1 - ndtr((c - 2) / sigma) * ndtr(c / sigma) ** (steps - 1)
    q = 1 - ndtr((c - 1) / sigma) * ndtr(c / sigma) ** (steps - 1)
    return float(np.max(np.log(np.maximum(p - delta, 1e-300) / np.maximum(q, 1e-15))))


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"), [(1.0, 1000, 1e-6), (0.8, 1000, 1e-6), (1.0, 100, 1e-5)]
)
def test_guarantee_once_per_epoch_covers_a_shuffle_that_poisson_does_not(sigma, steps, delta):
    attacked = shuffle_epsilon(sigma, steps, delta)
    epoch = OncePerEpoch(steps, BY_POSITION, Gaussian(sigma))
    naive = Repeated(PoissonSampled(1 / steps, Gaussian(sigma)), steps)
    for name in NAMES:
        assert accountant(name, ZERO_OUT).curve(epoch).epsilon(delta) >= attacked
    assert best(naive, delta, relation=ZERO_OUT).epsilon < attacked / 3


@pytest.mark.parametrize("relation", RELATIONS)
def test_guarantee_once_per_epoch_covers_balls_in_bins(relation):
    """Two bins and two records, by quadrature on the plane; the other record may hide or stress the first."""
    sigma, x = 0.8, np.linspace(-7, 7, 1401)

    def epoch(contributions):
        total = np.zeros((len(x), len(x)))
        for bins in itertools.product((0, 1), repeat=len(contributions)):
            sums = [sum(g for g, b in zip(contributions, bins, strict=True) if b == k) for k in (0, 1)]
            bumps = [np.exp(-((x - c) ** 2) / 2 / sigma**2) for c in sums]
            total += np.outer(*bumps) / (2 * np.pi * sigma**2) / 2 ** len(contributions)
        return total

    price = accountant("pld", relation).curve(OncePerEpoch(2, BY_RECORD, Gaussian(sigma)))
    for other in (-1.0, 0.0, 1.0):
        for pair in neighbours(relation, (other,)):
            for a, b in (pair, pair[::-1]):
                p, q = epoch(a), epoch(b)
                for epsilon in (0.0, 1.0, 3.0):
                    truth = float(np.sum(np.maximum(p - math.exp(epsilon) * q, 0)) * (x[1] - x[0]) ** 2)
                    assert truth - 1e-6 <= price.delta(epsilon)


def test_an_epoch_costs_one_gaussian_and_epochs_compose():
    epoch = OncePerEpoch(50, BY_RECORD, Gaussian(2.0))
    for relation, sigma in ((ADD_REMOVE, 2.0), (ZERO_OUT, 2.0), (REPLACE, 1.0)):
        bound = best(Repeated(epoch, 7), 1e-5, relation=relation)
        assert bound.epsilon == best(Repeated(Gaussian(sigma), 7), 1e-5).epsilon
        assert bound.method == "closed form"


@QUICK
@given(st.integers(1, 40), st.floats(0.6, 4), st.integers(1, 200), st.sampled_from([ZERO_OUT, REPLACE]))
def test_fixed_size_is_monotone_and_below_its_unsampled_gaussian(size, sigma, count, relation):
    def price(name, size, sigma, count):
        event = Repeated(FixedSize(size, 50, Gaussian(sigma)), count)
        return accountant(name, relation).curve(event).epsilon(1e-5)

    for name in ("pld", "rdp"):
        here = price(name, size, sigma, count) * (1 - 1e-3)
        assert price(name, size + 5, sigma, count) >= here
        assert price(name, size, sigma / 1.3, count) >= here
        assert price(name, size, sigma, count + 9) >= here
        assert here <= accountant(name).curve(Repeated(Gaussian(sigma / 2), count)).epsilon(1e-5)
    assert price("pld", size, sigma, count) <= price("rdp", size, sigma, count) * 1.0005


EVENTS = (
    Gaussian(1.0),
    PoissonSampled(0.1, Gaussian(1.0)),
    TruncatedPoisson(0.1, 90, 100, Gaussian(1.0)),
    FixedSize(10, 100, Gaussian(1.0)),
    OncePerEpoch(10, BY_RECORD, Gaussian(1.0)),
    OncePerEpoch(10, BY_POSITION, Gaussian(1.0)),
)


@pytest.mark.parametrize("name", NAMES)
def test_relations_order_prices_and_refuse_what_is_not_proven(name):
    refused = 0
    for event in EVENTS:
        prices = {}
        for relation in RELATIONS:
            try:
                prices[relation] = accountant(name, relation).curve(Repeated(event, 20)).epsilon(1e-5)
            except UnpricedEvent as error:
                refused += 1
                assert relation == ADD_REMOVE and repr(event) in str(error)
        assert prices[ZERO_OUT] <= prices[REPLACE] < math.inf
        assert prices.get(ADD_REMOVE, prices[ZERO_OUT]) == prices[ZERO_OUT]
    assert refused == 2


@pytest.mark.parametrize("event", EVENTS)
def test_events_round_trip(event):
    assert from_dict(json.loads(json.dumps(to_dict(Composed((event, Repeated(event, 3))))))) == Composed(
        (event, Repeated(event, 3))
    )


def test_no_noise_is_no_privacy_under_any_sampler():
    for relation in RELATIONS:
        for event in EVENTS[1:]:
            bare = from_dict({**to_dict(event), "event": to_dict(Gaussian(0.0))})
            assert math.isinf(accountant("rdp", relation).curve(bare).epsilon(1e-5))
    assert math.isinf(best(Composed((EVENTS[4], NonPrivate())), 1e-5).epsilon)


def test_filters_take_epochs_and_refuse_slips():
    epoch = OncePerEpoch(10, BY_RECORD, Gaussian(5.0))
    held = budget_filter(2.0, 1e-5, planned=Repeated(epoch, 4))
    held.spend(epoch)
    assert "gaussian" in held.bound().method
    step = TruncatedPoisson(0.1, 12, 100, Gaussian(2.0))
    with pytest.raises(
        UnpricedEvent, match=r"must be fed mechanisms with a Renyi price; got TruncatedPoisson"
    ):
        budget_filter(2.0, 1e-5, planned=PoissonSampled(0.1, Gaussian(2.0))).spend(step)


def test_steps_within_a_budget_follow_the_relation():
    event = PoissonSampled(0.01, Gaussian(1.0))
    given_ = {"event": event, "epsilon": 3.0, "delta": 1e-5, "accountant": "pld"}
    steps = calibrate.num_steps(**given_, relation=REPLACE)
    assert steps < calibrate.num_steps(**given_)
    curve = accountant("pld", REPLACE).curve(event)
    assert (curve * steps).epsilon(1e-5) <= 3.0 < (curve * (steps + 1)).epsilon(1e-5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: accountant("rdp", "swap"), r"relation must be one of .*got 'swap'; say who is protected"),
        (
            lambda: FixedSize(9, 8, Gaussian(1.0)),
            r"batch_size must be at most num_records=8; got 9; lower it",
        ),
        (lambda: FixedSize(0, 8, Gaussian(1.0)), "batch_size must be an integer >= 1; got 0"),
        (
            lambda: TruncatedPoisson(0.1, True, 8, Gaussian(1.0)),
            "max_batch_size must be an integer >= 1; got True",
        ),
        (lambda: OncePerEpoch(3, "shuffled", Gaussian(1.0)), r"assignment must be one of .*got 'shuffled'"),
        (
            lambda: accountant("rdp").curve(OncePerEpoch(3, BY_RECORD, Repeated(Gaussian(1.0), 2))),
            r"event\.OncePerEpoch\.event must be a Gaussian",
        ),
        (
            lambda: accountant("pld").curve(Gaussian(1.0)) + accountant("pld", REPLACE).curve(Gaussian(1.0)),
            "curves must come from one accountant and relation",
        ),
        (
            lambda: accountant("rdp").curve(Gaussian(1.0)) + accountant("rdp", REPLACE).curve(Gaussian(1.0)),
            "curves must be of one relation",
        ),
    ],
)
def test_refusals_say_expected_got_remedy(make, match):
    with pytest.raises(ValueError, match=match):
        make()
