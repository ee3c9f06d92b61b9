# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling: independent inclusion at the rate that is charged, by mean, variance and pairs."""

import numpy as np
import pytest
import torch

from accountants import Gaussian, PoissonSampled
from dpopt import BatchMemoryManager, PoissonSampling, poisson
from dpopt.randomness import generator, insecure_key
from tests.support.dpopt.inclusion import DRAWS, RATE, RECORDS, SMALL, matrix, p_values
from tests.support.dpopt.private_runs import examples, explicit, familiar, mlp


@pytest.fixture(scope="module")
def taken():
    sampling = PoissonSampling(RATE, 1.0)
    key = insecure_key(0)
    return matrix([sampling.draw(RECORDS, generator(key, "sampling", i)) for i in range(DRAWS)])


def test_guarantee_inclusion_is_independent_at_the_stated_rate(taken):
    assert min(p_values(taken, RATE).values()) > SMALL


def test_a_rate_off_by_two_percent_would_be_noticed(taken):
    assert p_values(taken, 1.02 * RATE)["total"] < SMALL
    assert p_values(taken, 0.98 * RATE)["total"] < SMALL


def test_shuffled_batches_would_be_noticed():
    source, size = np.random.default_rng(0), int(RATE * RECORDS)
    found = p_values(matrix([source.permutation(RECORDS)[:size] for _ in range(DRAWS)]), RATE)
    assert found["variance"] < SMALL
    groups = source.random((DRAWS, RECORDS // 2)) < RATE  # pairs of records that always come together
    found = p_values(np.repeat(groups, 2, axis=1).astype(float), RATE)
    assert found["pairs"] < SMALL and found["total"] > SMALL


def test_a_draw_is_sorted_without_repetition_and_may_be_empty():
    sampling = PoissonSampling(0.02, 1.0)
    draws = [sampling.draw(50, generator(insecure_key(0), i)) for i in range(100)]
    assert all(draw == sorted(set(draw)) for draw in draws)
    assert [] in draws
    assert PoissonSampling(1.0, 1.0).draw(5, torch.Generator()) == [0, 1, 2, 3, 4]
    assert sampling.draw(0, torch.Generator()) == []


@pytest.mark.parametrize("physical", [None, 3])
def test_the_loader_hands_out_the_draws_of_the_charged_sampler(physical):
    """Through loader and collate, over epochs: sizes have the mean and variance of the rate in the ledger."""
    numbered = torch.utils.data.TensorDataset(torch.arange(40.0), torch.zeros(40))
    engine, _, optimizer, loader = familiar(
        model=torch.nn.Linear(1, 1), dataset=numbered, batch_size=10, noise=1.0
    )
    assert engine.training.event == PoissonSampled(0.25, Gaussian(1.0))
    source = loader
    if physical:
        manager = BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
        )
        source = manager.__enter__()
    taken, row = [], None
    with torch.no_grad():
        for _ in range(150):
            for numbers, _ in source:
                row = torch.zeros(40) if row is None else row
                row[numbers.long()] += 1
                assert physical is None or len(numbers) <= physical
                if not (physical and len(numbers) == physical):
                    taken.append(row)
                    row = None
    sizes = torch.stack(taken).sum(1)
    if physical is None:  # an exact multiple of the part size hides the end of a draw from this test
        assert len(sizes) == 600 and torch.stack(taken).max() == 1
        assert abs(sizes.mean() - 10) < 5 * (7.5 / 600) ** 0.5
        assert abs(sizes.var() - 7.5) < 5 * 7.5 * (2 / 600) ** 0.5
    assert abs(sizes.sum() - 6000) < 5 * (6000 * 0.75) ** 0.5
    engine.detach()


def test_two_draws_are_independent():
    with explicit(mlp(), rate=0.5, insecure_seed=0) as private:
        draws = np.array(
            [[i in set(private.draw(30).indices) for i in range(30)] for _ in range(400)], dtype=float
        )
    a, b = draws[::2] - 0.5, draws[1::2] - 0.5
    assert abs((a * b).sum()) / (0.25 * np.sqrt(a.size)) < 5


def test_poisson_states_rate_and_public_batch_size():
    assert poisson(num_records=1000, batch_size=10) == PoissonSampling(0.01, 10.0)
    for wrong in (0, -1, 1001):
        with pytest.raises(ValueError, match="expected 0 < batch_size <= num_records"):
            poisson(num_records=1000, batch_size=wrong)
    for rate in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected 0 < sampling_rate <= 1"):
            PoissonSampling(rate, 1.0)
    for size in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected a finite expected_batch_size > 0"):
            PoissonSampling(0.5, size)


def test_the_dataset_may_be_smaller_or_larger_than_the_public_number():
    """Rate and divisor are constants: neither follows the secret length of the data."""
    for size in (3, 8, 30):
        model = mlp()
        with explicit(model, rate=0.5, expected=4.0, noise=1.0) as private:
            for _ in private.batches(examples(size), steps=2):
                private.release()
            assert private.event == PoissonSampled(0.5, Gaussian(1.0))
            assert private.sampling.expected_batch_size == 4.0
