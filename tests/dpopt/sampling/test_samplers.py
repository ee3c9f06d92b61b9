# SPDX-License-Identifier: Apache-2.0
"""Every sampler draws what its event says, and its rounds are charged as a whole."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from accountants import (
    ADD_REMOVE,
    BY_POSITION,
    BY_RECORD,
    RELATIONS,
    REPLACE,
    ZERO_OUT,
    FixedSize,
    Gaussian,
    OncePerEpoch,
    PoissonSampled,
    Repeated,
    TruncatedPoisson,
    UnpricedEvent,
    accountant,
)
from dpopt.randomness import generator, insecure_key
from dpopt.sampling import FixedSizeSampling, PoissonSampling, TruncatedPoissonSampling
from dpopt.sampling.epochs import BallsInBins, CyclicSampling, ShuffledSampling
from dpopt.sampling.registry import SAMPLERS, sampler
from dpopt.sampling.sampler import padded
from dpopt.sampling.users import Users, UserSampling

RECORDS = 12
SAMPLINGS = {
    "balls-in-bins": BallsInBins(4, 3.0),
    "cyclic": CyclicSampling(RECORDS, 5),
    "fixed-size": FixedSizeSampling(3, RECORDS),
    "poisson": PoissonSampling(0.25, 3.0),
    "shuffled": ShuffledSampling(RECORDS, 5),
    "truncated-poisson": TruncatedPoissonSampling(0.25, 5, RECORDS, 3.0),
    "users": UserSampling(0.25, 3.0),
}
EPOCHS = [name for name in SAMPLINGS if SAMPLINGS[name].steps_per_charge > 1]
KEY = insecure_key(0)


def round_of(sampling, number, num_records=RECORDS):
    """All batches of one round."""
    steps = range(sampling.steps_per_charge)
    return [sampling.draw(num_records, generator(KEY, "sampling", number), step) for step in steps]


@pytest.mark.parametrize("name", SAMPLERS)
class TestSampler:
    """The law of samplers. A new one is one line in the table above."""

    def test_draws_are_sorted_distinct_and_in_range(self, name):
        sampling = SAMPLINGS[name]
        for number in range(50):
            for batch in round_of(sampling, number):
                assert batch == sorted(set(batch))
                assert all(0 <= index < RECORDS for index in batch)

    def test_a_round_is_its_generator(self, name):
        sampling = SAMPLINGS[name]
        assert type(sampling) is sampler(name)
        assert [round_of(sampling, i) for i in range(5)] == [round_of(sampling, i) for i in range(5)]
        if name != "cyclic":
            assert len({str(round_of(sampling, i)) for i in range(20)}) > 1

    def test_steps_outside_the_round_are_refused(self, name):
        sampling = SAMPLINGS[name]
        for step in (-1, sampling.steps_per_charge):
            with pytest.raises(ValueError, match=r"expected 0 <= step < .*begin a new round"):
                sampling.draw(RECORDS, torch.Generator(), step)

    def test_it_has_a_price_under_zero_out_and_a_finite_divisor(self, name):
        sampling = SAMPLINGS[name]
        event = sampling.event(Gaussian(3.0))
        assert 0 < sampling.expected_batch_size < math.inf
        for rule in ("pld", "rdp"):
            assert accountant(rule, ZERO_OUT).curve(Repeated(event, 3)).epsilon(0.3) < math.inf

    def test_the_mean_batch_is_the_expected_one_or_smaller(self, name):
        sampling = SAMPLINGS[name]
        sizes = [len(batch) for number in range(300) for batch in round_of(sampling, number)]
        assert np.mean(sizes) <= sampling.expected_batch_size * 1.1


@pytest.mark.parametrize("name", EPOCHS)
def test_guarantee_epochs_give_each_record_one_batch(name):
    sampling = SAMPLINGS[name]
    for number in range(30):
        assert sorted(itertools.chain(*round_of(sampling, number))) == list(range(RECORDS))
    by = BY_RECORD if name == "balls-in-bins" else BY_POSITION
    assert sampling.event(Gaussian(1.0)) == OncePerEpoch(sampling.steps_per_charge, by, Gaussian(1.0))


def test_balls_in_bins_give_each_record_a_coin_of_its_own():
    """What the price under add-or-remove-one rests on: bins are uniform and independent between records."""
    sampling, rounds = BallsInBins(3, 4.0), 3000
    bins = np.zeros((rounds, RECORDS), dtype=int)
    for number in range(rounds):
        for step, batch in enumerate(round_of(sampling, number)):
            bins[number, batch] = step
    assert stats.chisquare(np.bincount(bins.ravel(), minlength=3)).pvalue > 1e-6
    for a, b in ((0, 1), (3, 7), (10, 11)):
        table = np.histogram2d(bins[:, a], bins[:, b], bins=3)[0]
        assert stats.chi2_contingency(table).pvalue > 1e-6
    shuffled = np.array([[len(b) for b in round_of(ShuffledSampling(RECORDS, 4), i)] for i in range(50)])
    assert (shuffled == 4).all()  # the same test tells a shuffle apart: its sizes never vary


def test_guarantee_fixed_size_draws_every_subset_alike():
    sampling = FixedSizeSampling(2, 5)
    draws = [tuple(sampling.draw(5, generator(KEY, i))) for i in range(6000)]
    counts = [draws.count(subset) for subset in itertools.combinations(range(5), 2)]
    assert sum(counts) == 6000
    assert stats.chisquare(counts).pvalue > 1e-6
    assert sampling.event(Gaussian(1.0)) == FixedSize(2, 5, Gaussian(1.0))


def test_guarantee_truncation_keeps_an_even_choice():
    """Every kept subset has the probability of Poisson below the cap, and an even share of the rest at it."""
    rate, most, records, draws = 0.5, 2, 4, 8000
    sampling = TruncatedPoissonSampling(rate, most, records, 2.0)
    found = [tuple(sampling.draw(records, generator(KEY, i))) for i in range(draws)]
    expected = {}
    for size in range(records + 1):
        for drawn in itertools.combinations(range(records), size):
            kept = list(itertools.combinations(drawn, min(size, most)))
            for subset in kept:
                weight = rate**size * (1 - rate) ** (records - size) / len(kept)
                expected[subset] = expected.get(subset, 0) + weight * draws
    assert set(found) <= set(expected)
    observed = [found.count(subset) for subset in expected]
    assert stats.chisquare(observed, list(expected.values())).pvalue > 1e-6
    first = [expected[s] for s in expected if 0 in s]  # a sampler that keeps the first ones would be noticed
    assert abs(sum(0 in d for d in found) - sum(first)) < 5 * math.sqrt(sum(first))
    assert sampling.event(Gaussian(1.0)) == TruncatedPoisson(rate, most, records, Gaussian(1.0))


def test_truncation_far_above_the_mean_is_poisson():
    uncut, cut = PoissonSampling(0.3, 30.0), TruncatedPoissonSampling(0.3, 100, 100, 30.0)
    assert [uncut.draw(90, generator(KEY, i)) for i in range(9)] == [
        cut.draw(90, generator(KEY, i)) for i in range(9)
    ]


def test_padding_gives_one_shape():
    for indices in ([], [4], [1, 2, 3]):
        filled, real = padded(indices, 3)
        assert len(filled) == len(real) == 3
        assert [i for i, there in zip(filled, real, strict=True) if there] == indices
    with pytest.raises(ValueError, match="expected at most 2 indices; got more"):
        padded([1, 2, 3], 2)


def test_guarantee_users_come_whole_and_within_the_cap():
    owners = ["a", "b", "a", "c", "a", "b"]
    users = Users.of([10, 11, 12, 13, 14, 15], owners, max_records=2)
    assert [users[i] for i in range(len(users))] == [(10, 12), (11, 15), (13,)]
    less = Users.of([10, 11, 12, 13, 14], owners[:5], max_records=2)  # one record of b gone: only b changes
    assert less[0] == users[0] and less[2] == users[2]
    sampling = UserSampling(0.5, 1.5)
    drawn = [sampling.draw(len(users), generator(KEY, i)) for i in range(4000)]
    for user in range(3):
        assert abs(sum(user in batch for batch in drawn) - 2000) < 5 * math.sqrt(1000)
    assert sampling.event(Gaussian(1.0)) == PoissonSampled(0.5, Gaussian(1.0))


def test_by_position_is_refused_where_records_come_and_go():
    for name, sampling in SAMPLINGS.items():
        event = sampling.event(Gaussian(3.0))
        if name in ("cyclic", "shuffled", "fixed-size"):
            with pytest.raises(
                UnpricedEvent, match=r"proven price under add-or-remove-one; got .*another relation"
            ):
                accountant("rdp", ADD_REMOVE).curve(event)
        else:
            accountant("rdp", ADD_REMOVE).curve(event)
        assert accountant("rdp", REPLACE).curve(event).epsilon(0.3) >= 0
    assert set(RELATIONS) == {ADD_REMOVE, REPLACE, ZERO_OUT}


def test_a_shuffle_is_never_priced_as_poisson():
    """The epoch costs what Chua et al. 2024 make it cost; at this noise Poisson would be 20 times less."""
    steps = 1000
    epoch = ShuffledSampling(steps * 10, 10).event(Gaussian(1.0))
    naive = Repeated(PoissonSampled(1 / steps, Gaussian(1.0)), steps)
    charged = accountant("pld", ZERO_OUT).curve(epoch).epsilon(1e-6)
    assert charged > 20 * accountant("pld", ZERO_OUT).curve(naive).epsilon(1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sampler("random"), r"expected a sampler out of .*'balls-in-bins'.*got 'random'"),
        (lambda: BallsInBins(0, 1.0), "expected an integer num_batches >= 1; got 0"),
        (lambda: BallsInBins(3, math.nan), "expected a finite expected_batch_size > 0; got nan"),
        (lambda: ShuffledSampling(10, 11), "expected batch_size <= num_records; got 11 of 10"),
        (lambda: CyclicSampling(10, 2.5), "expected an integer batch_size >= 1; got 2.5"),
        (lambda: TruncatedPoissonSampling(0.1, 11, 10, 1.0), "got 11 of 10; lower"),
        (
            lambda: TruncatedPoissonSampling(0.1, 5, 10, 1.0).draw(11, torch.Generator()),
            "expected at most the public 10 records; got more",
        ),
        (
            lambda: ShuffledSampling(10, 5).draw(9, torch.Generator()),
            "expected a dataset of the public length 10",
        ),
        (lambda: FixedSizeSampling(3, 10).draw(11, torch.Generator()), "the public length 10; got another"),
        (lambda: UserSampling(1.5, 3.0), "expected 0 < sampling_rate <= 1; got 1.5"),
        (lambda: Users.of([1, 2], ["a"], max_records=1), "expected one owner for each record; got 1"),
        (
            lambda: Users.of([1], ["a"], max_records=0),
            "expected max_records >= 1; got 0; choose a public cap",
        ),
    ],
)
def test_refusals_say_expected_got_remedy(make, match):
    with pytest.raises(ValueError, match=match):
        make()
