# SPDX-License-Identifier: Apache-2.0
"""Schedules of noise and clip norm: Opacus' values, each step charged with the noise that it got."""

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus import schedulers as theirs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpopt
from accountants import accountant as find_accountant
from dpopt import PrivacyEngine
from dpopt.compatibility import schedulers
from tests.support.dpopt.private_runs import clipped_mean, examples, familiar, mlp, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Optimal order is the"),
]
DELTA = 1e-5
SCHEDULES = [
    ("ExponentialNoise", {"gamma": 0.9}),
    ("StepNoise", {"step_size": 2, "gamma": 1.3}),
    ("LambdaNoise", {"noise_lambda": lambda epoch: 1 / (1 + epoch)}),
    ("ExponentialGradClip", {"gamma": 0.8}),
    ("StepGradClip", {"step_size": 3, "gamma": 0.5}),
    ("LambdaGradClip", {"scheduler_function": lambda epoch: 1 + epoch / 10}),
]


@pytest.mark.parametrize(("name", "options"), SCHEDULES)
def test_values_history_and_epsilon_are_those_of_opacus(name, options):
    seen, histories, bounds = [], [], []
    for library, module in ((dpopt, schedulers), (opacus, theirs)):
        model, engine = nn.Linear(4, 3), library.PrivacyEngine(accountant="rdp")
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(examples(40), batch_size=20), noise_multiplier=1.5, max_grad_norm=2.0,
        )  # fmt: skip
        schedule = getattr(module, name)(optimizer, **options)
        values = []
        for _ in range(4):
            for x, y in loader:
                if len(x):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                values.append((optimizer.noise_multiplier, optimizer.max_grad_norm))
            schedule.step()
        seen.append((values, schedule.last_epoch))
        histories.append(engine.accountant.history)
        bounds.append(engine.get_epsilon(DELTA))
    assert seen[0] == seen[1]
    assert histories[0] == histories[1] and sum(steps for *_, steps in histories[0]) == 8
    assert bounds[1] * 0.9 <= bounds[0] <= bounds[1] * 1.001


def test_guarantee_a_varied_step_is_charged_with_its_own_noise():
    """The noise in the gradient, the event on the ledger and the price follow the schedule together."""
    torch.manual_seed(0)
    model = nn.Linear(300, 60, bias=False)
    data = TensorDataset(torch.zeros(20, 300), torch.zeros(20, dtype=torch.long))
    engine, model, optimizer, loader = familiar(model, data, batch_size=10, noise=2.0)
    noise = dpopt.LambdaNoise(optimizer, noise_lambda=lambda epoch: 0.5**epoch)
    clip = dpopt.StepGradClip(optimizer, step_size=1, gamma=3.0)
    for epoch in range(3):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            std = 2 * 0.5**epoch * 3**epoch / 10
            assert float(model.weight.grad.std()) == pytest.approx(std, rel=0.05)
            assert engine.training.noise_stds["weight"] == pytest.approx(std)
        noise.step()
        clip.step()
    charged = engine.training.ledger.events()
    assert engine.accountant.history == [(2.0, 0.5, 2), (1.0, 0.5, 2), (0.5, 0.5, 2)]
    assert engine.get_epsilon(DELTA) == find_accountant("rdp").curve(charged).epsilon(DELTA)
    assert any("fixed before the data were seen" in text for text in engine.training.bound(DELTA).assumptions)


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_the_clip_norm_moves_with_the_step_after(clipping):
    data = examples(8, torch.float64)
    engine, model, optimizer, loader = familiar(
        mlp(torch.float64), data, clipping=clipping, max_grad_norm=1.0
    )
    dpopt.ExponentialGradClip(optimizer, gamma=0.5).step()
    assert optimizer.max_grad_norm == 0.5
    expected = clipped_mean(model, data, clip=0.5)
    train(model, optimizer, loader)
    assert engine.training.sum.clipper.sensitivity == pytest.approx(0.5)
    if clipping == "flat":
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-12)


def test_a_schedule_that_is_stepped_within_a_step_keeps_it_whole():
    """The open step has its clip norm already; its noise is charged as it is released."""
    engine, model, optimizer, loader = familiar(dataset=examples(16), noise=1.0)
    noise = dpopt.ExponentialNoise(optimizer, gamma=0.5)
    clip = dpopt.ExponentialGradClip(optimizer, gamma=0.5)
    batches = iter(loader)
    x, y = next(batches)
    noise.step()
    clip.step()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert engine.training.noise_stds["0.weight"] == pytest.approx(0.5 * 1.0 / 8)
    x, y = next(batches)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert engine.training.noise_stds["0.weight"] == pytest.approx(0.5 * 0.5 / 8)
    assert engine.accountant.history == [(0.5, 0.5, 2)]


def test_the_state_of_a_schedule_goes_on_in_another_run():
    _, _, optimizer, _ = familiar(noise=2.0)
    first = dpopt.StepNoise(optimizer, step_size=2, gamma=0.5)
    for _ in range(5):
        first.step()
    assert first.value == optimizer.noise_multiplier == 0.5
    _, _, other, _ = familiar(noise=2.0)
    second = dpopt.StepNoise(other, step_size=2, gamma=0.5)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict() == {"last_epoch": 5, "noise_multiplier": 0.5}
    second.step()
    assert other.noise_multiplier == 0.25
    with pytest.raises(ValueError, match="expected the state of a schedule of max_grad_norm"):
        dpopt.ExponentialGradClip(other, gamma=1.0).load_state_dict(first.state_dict())


def test_schedules_are_refused_where_they_would_lie():
    model = mlp()
    _, optimizer, _ = PrivacyEngine(accountant="rdp").make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), max_grad_norm=1.0,
        data_loader=DataLoader(examples(100), batch_size=10), target_epsilon=3.0, target_delta=DELTA, epochs=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"got a budget, .* clipping=\"schedule:steps=1000,noise_end=0.7\""):
        dpopt.ExponentialNoise(optimizer, gamma=0.9)
    dpopt.ExponentialGradClip(optimizer, gamma=0.9)  # costs nothing
    engine = PrivacyEngine(accountant="rdp", sampler="balls-in-bins")
    _, _, optimizer, _ = familiar(engine=engine, dataset=examples(16), noise=1.0)
    with pytest.raises(ValueError, match="whose charges pay for a whole epoch"):
        dpopt.ExponentialNoise(optimizer, gamma=0.9)
    for options in ({"clipping": "quantile"}, {"clipping": "per_layer", "max_grad_norm": [1.0] * 4}):
        _, _, optimizer, _ = familiar(noise=1.0, **options)
        with pytest.raises(
            ValueError, match="expected one max_grad_norm and a way to clip that follows nothing else"
        ):
            dpopt.ExponentialGradClip(optimizer, gamma=0.9)
    _, _, optimizer, _ = familiar(noise=1.0)
    with pytest.raises(ValueError, match="expected a schedule with a noise multiplier > 0; got 0"):
        dpopt.LambdaNoise(optimizer, noise_lambda=lambda epoch: 0.0)
    with pytest.raises(ValueError, match="expected a number for noise_multiplier"):
        dpopt.LambdaNoise(optimizer, noise_lambda=lambda epoch: torch.tensor(1.0))
    for odd in ({"gamma": 0.0, "step_size": 1}, {"gamma": 1.0, "step_size": 0}):
        with pytest.raises(ValueError, match="expected gamma > 0 and step_size >= 1"):
            dpopt.StepNoise(optimizer, **odd)
    with pytest.raises(ValueError, match="expected the optimizer of an open private run"):
        dpopt.StepNoise(torch.optim.SGD(mlp().parameters(), lr=0.1), gamma=0.5, step_size=1)
    assert optimizer.noise_multiplier == 1.0


def test_a_run_without_noise_may_have_a_schedule_that_does_nothing():
    _, model, optimizer, loader = familiar(noise=0.0)
    schedule = dpopt.ExponentialNoise(optimizer, gamma=0.5)
    train(model, optimizer, loader)
    schedule.step()
    assert optimizer.noise_multiplier == 0.0
