# SPDX-License-Identifier: Apache-2.0
"""Budgets and numbers that nobody can have meant are refused with words."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dpopt import (
    BallsInBins,
    Budget,
    CyclicSampling,
    FixedSizeSampling,
    FlatClipper,
    GaussianMechanism,
    GroupGaussianMechanism,
    PoissonSampling,
    PrivacyEngine,
    UserSampling,
    by_component,
    epsilon,
    noise_multiplier,
    per_parameter,
)
from dpopt.sampling.registry import population, sized, touched
from tests.support.dpopt.private_runs import examples, explicit, familiar, mlp


@pytest.mark.parametrize("odd", [True, False, "1.0", None, torch.tensor(1.0), [1.0]])
def test_what_is_no_number_is_no_budget_and_no_noise(odd):
    for make in (lambda: Budget(odd, 1e-5), lambda: Budget(1.0, odd), lambda: GaussianMechanism(odd),
                 lambda: GroupGaussianMechanism(odd)):  # fmt: skip
        with pytest.raises(ValueError, match="expected a number for"):
            make()


def test_numbers_of_numpy_are_numbers():
    assert Budget(np.float64(2.0), np.float32(1e-5)).epsilon == 2
    assert GaussianMechanism(np.float32(1.5)).noise_multiplier == 1.5


def test_true_is_no_clip_norm_epsilon_or_delta_anywhere():
    model = mlp()
    for make in (
        lambda: FlatClipper(True),
        lambda: per_parameter(model, [True] * 4),
        lambda: by_component(model, {"*": True}),
        lambda: epsilon(noise_multiplier=1.0, sampling_rate=0.1, steps=1, delta=False),
        lambda: epsilon(noise_multiplier=True, sampling_rate=0.1, steps=1, delta=1e-5),
        lambda: noise_multiplier(epsilon=True, delta=1e-5, sampling_rate=0.1, steps=1),
    ):
        with pytest.raises(ValueError, match=r"got (True|False)"):
            make()


PRIVATE = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
TARGET = {"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 1, "max_grad_norm": 1.0}


@pytest.mark.parametrize(
    ("settings", "name", "odd"),
    [(PRIVATE, "noise_multiplier", True), (PRIVATE, "max_grad_norm", True), (PRIVATE, "max_grad_norm", [True] * 4),
     (TARGET, "target_epsilon", True), (TARGET, "target_delta", False), (TARGET, "epochs", True),
     (TARGET, "max_grad_norm", True), (TARGET, "target_epsilon", "3"), (PRIVATE, "max_grad_norm", "1")],
)  # fmt: skip
def test_the_familiar_door_takes_no_bool_for_a_number(settings, name, odd):
    model = mlp()
    method = "make_private" if settings is PRIVATE else "make_private_with_epsilon"
    options = {**settings, name: odd}
    if isinstance(odd, list):
        options["clipping"] = "per_layer"
    with pytest.raises(ValueError, match=r"got (True|False|'3'|'1')"):
        getattr(PrivacyEngine(accountant="rdp"), method)(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(examples(8), batch_size=4), **options,
        )  # fmt: skip


def with_epsilon(num=200, **changes):
    model = mlp()
    engine = PrivacyEngine(accountant="rdp")
    engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(examples(num), batch_size=10), **{**TARGET, **changes},
    )  # fmt: skip
    return engine


def test_a_delta_above_one_record_is_refused_unless_asked_for_by_name():
    with pytest.raises(
        ValueError, match=r"expected delta of at most 1 / number of records, 0.005; got 0.006"
    ):
        with_epsilon(target_delta=0.006)
    assert with_epsilon(target_delta=0.005).noise_multiplier > 0
    assert with_epsilon(target_delta=0.006, allow_large_delta=True).noise_multiplier > 0
    with pytest.raises(ValueError, match="allow_large_delta=True"):
        explicit(mlp(), rate=0.1, expected=10.0, noise=1.0, budget=Budget(3.0, 0.011))
    explicit(mlp(), rate=0.1, expected=10.0, noise=1.0, budget=Budget(3.0, 0.01))
    explicit(mlp(), rate=0.1, expected=10.0, noise=1.0, budget=Budget(3.0, 0.011, allow_large_delta=True))


def test_a_budget_that_needs_no_noise_or_that_no_noise_meets_is_refused():
    with pytest.raises(ValueError, match="expected a finite epsilon; got inf"):
        with_epsilon(target_epsilon=math.inf)
    with pytest.raises(ValueError, match=r"expected a delta below 0.642, the probability"):
        with_epsilon(target_delta=0.7, allow_large_delta=True)
    assert with_epsilon(target_delta=0.3, allow_large_delta=True).noise_multiplier > 1e-3
    with pytest.raises(ValueError, match="must be reachable"):
        with_epsilon(target_epsilon=1e-12, target_delta=1e-300)


def test_an_epsilon_at_a_large_delta_is_given_with_a_warning():
    engine = familiar(dataset=examples(20), batch_size=10, noise=1.0)[0]
    with pytest.warns(UserWarning, match="delta 0.5 is above 1 / number of records"):
        engine.get_epsilon(0.5)
    engine.get_epsilon(0.05)


def test_how_many_records_a_sampler_draws_from_and_who_is_touched():
    assert population(PoissonSampling(0.1, 20.0)) == pytest.approx(200)
    assert population(UserSampling(0.5, 3.0)) == 6
    assert population(BallsInBins(4, 25.0)) == 100
    assert population(FixedSizeSampling(3, 30)) == population(CyclicSampling(30, 3)) == 30
    assert population(sized("truncated-poisson", num_records=70, batch_size=7)) == 70
    assert touched(PoissonSampling(0.1, 20.0), 3) == pytest.approx(1 - 0.9**3)
    assert touched(FixedSizeSampling(3, 30), 3) == pytest.approx(1 - 0.9**3)
    assert touched(PoissonSampling(1.0, 20.0), 1) == touched(CyclicSampling(30, 3), 1) == 1
    assert touched(PoissonSampling(0.1, 20.0), 0) == 0
