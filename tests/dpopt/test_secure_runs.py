# SPDX-License-Identifier: Apache-2.0
"""The secure tier and the samplers of an epoch through both doors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader

from accountants import ZERO_OUT, Composed, Gaussian, OncePerEpoch, Repeated, accountant
from dpopt import (
    BatchMemoryManager,
    BudgetExhausted,
    PoissonSampling,
    PrivacyEngine,
    TruncatedPoissonSampling,
)
from dpopt.mechanisms import summation_rounding
from dpopt.mechanisms.grid_gaussian import ROUNDING
from dpopt.randomness import insecure_key
from dpopt.release.randomness_tiers import most_examples, tier
from tests.support.dpopt.private_runs import (
    NOBODY,
    D,
    K,
    assert_gradients,
    clipped_mean,
    examples,
    explicit,
    familiar,
    losses_of,
    mlp,
    train,
)

KEY = insecure_key(1)


def test_the_explicit_door_is_secure_end_to_end():
    model, data = mlp(), examples(8)
    expected = clipped_mean(model, data)
    with explicit(model, noise=1e-3, randomness="secure") as private:
        for batch in private.batches(data, steps=1):
            private.accumulate(losses_of(model, batch.examples))
            private.release()
        assert private.ledger.attempts[-1]["randomness"] == "secure"
    assert_gradients(model, expected, tolerance=1e-3)
    wide = nn.Sequential(nn.Linear(D, 300), nn.Linear(300, K))
    with explicit(wide, noise=2.0, rate=NOBODY, expected=4.0, randomness="secure") as private:
        for _ in private.batches(data, steps=1):
            private.release()
    z = np.concatenate([p.grad.flatten().numpy() for p in wide.parameters()]) * 2.0
    # 8 + 6 sqrt(8) + 20 examples at most: the noise pays for their rounding, 0.1 % here.
    assert stats.kstest(z, "norm").pvalue > 1e-6
    assert 0.9 < z.std() < 1.1


def test_the_familiar_door_is_secure_end_to_end():
    engine = PrivacyEngine(accountant="rdp", secure_mode=True)
    engine, model, optimizer, loader = familiar(dataset=examples(24), batch_size=4, noise=1.0, engine=engine)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, loader)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    said = engine.training.bound(1e-5).assumptions
    assert any("AES-256" in text for text in said) and any(
        "rounding in floating-point" in text for text in said
    )
    assert engine.training.ledger.num_charges == 6 and 0 < engine.get_epsilon(1e-5) < 100
    engine.detach()


def test_the_rounding_covers_the_batches_that_are_drawn():
    assert most_examples(PoissonSampling(0.1, 100.0)) == 180
    assert most_examples(TruncatedPoissonSampling(0.1, 70, 1000, 100.0)) == 70
    few, many = tier("secure", KEY, 50), tier("secure", KEY, 600)
    assert few.rounding == ROUNDING >= summation_rounding(50, 50)
    assert many.rounding == summation_rounding(600, 600) > 0.04
    assert tier("secure", KEY, 600, torch.float64).rounding == ROUNDING
    assert any("at most 600 examples" in text for text in many.assumptions)


def epoch_engine(sampler, relation, num_records=20, **options):
    engine = PrivacyEngine(accountant="rdp", sampler=sampler, relation=relation)
    return familiar(
        dataset=examples(num_records), batch_size=3 * num_records // 10, engine=engine, **options
    )


@pytest.mark.parametrize("physical", [None, 2])
@pytest.mark.parametrize(
    ("sampler", "relation"), [("balls-in-bins", "add-or-remove-one"), ("shuffled", ZERO_OUT)]
)
def test_the_familiar_door_prices_an_epoch_as_one(sampler, relation, physical):
    # A row stands in for an empty bin; of 80 records no bin of four is empty, but once in 20 million runs.
    engine, model, optimizer, loader = epoch_engine(sampler, relation, 80, noise=2.0, poisson_sampling=False)
    assert len(loader) == 4
    for _ in range(2):
        seen = 0
        if physical is None:
            for inputs, labels in loader:
                optimizer.zero_grad()
                seen += len(inputs)
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
        else:
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer
            ) as small:
                for inputs, labels in small:
                    optimizer.zero_grad()
                    seen += len(inputs)
                    F.cross_entropy(model(inputs), labels).backward()
                    optimizer.step()
        assert seen == 80
    (charged,) = engine.training.ledger.events().events
    assert isinstance(charged, Repeated) and charged.count == 2
    assert isinstance(charged.event, OncePerEpoch) and charged.event.steps == 4
    price = accountant("rdp", relation).curve(Composed((Repeated(charged.event, 2),))).epsilon(1e-5)
    assert engine.get_epsilon(1e-5) == price
    assert price == pytest.approx(accountant("rdp").curve(Repeated(Gaussian(2.0), 2)).epsilon(1e-5))
    engine.detach()


def test_a_broken_epoch_is_paid_for_and_the_next_loop_ends_it():
    engine, model, optimizer, loader = epoch_engine("shuffled", ZERO_OUT, noise=2.0)
    for loop in range(2):
        for inputs, labels in loader:
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if loop == 0:
                break
    assert engine.training.steps == 5 and engine.training.ledger.num_charges == 2
    engine.detach()


def test_a_target_epsilon_is_kept_by_epochs():
    engine = PrivacyEngine(accountant="rdp", sampler="balls-in-bins")
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=DataLoader(examples(20), batch_size=6),
        target_epsilon=3.0, target_delta=1e-5, epochs=2, max_grad_norm=1.0, poisson_sampling=False,
    )  # fmt: skip
    for _ in range(2):
        train(model, optimizer, loader)
    assert 2.9 < engine.get_epsilon(1e-5) <= 3.0
    with pytest.raises(BudgetExhausted):
        train(model, optimizer, loader)
    engine.detach()
