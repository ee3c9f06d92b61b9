# SPDX-License-Identifier: Apache-2.0
"""The familiar door: an ordinary loop, on the user's own model, optimizer and loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accountants import calibrate
from dpopt import BatchMemoryManager, BudgetExhausted, PrivacyEngine
from tests.support.dpopt.private_runs import (
    D,
    assert_gradients,
    clipped_mean,
    examples,
    familiar,
    leftovers,
    mlp,
    train,
)


def test_three_objects_two_of_them_the_same():
    model, dataset = mlp(), examples(20)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, same_model, same_optimizer, loader = familiar(model, dataset, optimizer=optimizer)
    assert same_model is model and same_optimizer is optimizer and type(optimizer) is torch.optim.AdamW
    assert isinstance(loader, DataLoader) and len(loader) == 3 and loader.dataset is dataset
    for mode in ("functorch", "ew"):
        assert familiar(grad_sample_mode=mode)[0] is not engine  # three objects each time


def test_no_gradient_exists_before_the_step():
    _, model, optimizer, loader = familiar(noise=1.0)
    for inputs, labels in loader:
        F.cross_entropy(model(inputs), labels).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_released_gradient_is_the_clipped_mean(reduction, parts):
    model, data = mlp(torch.float64), examples(8, torch.float64)
    expected = clipped_mean(model, data)
    _, model, optimizer, loader = familiar(
        model, data, loss_reduction=reduction, criterion=nn.CrossEntropyLoss(reduction=reduction)
    )
    train(model, optimizer, loader, lambda x, y: F.cross_entropy(x, y, reduction=reduction), parts)
    if reduction == "sum":  # the sum itself, as in Opacus
        expected = {name: value * 8 for name, value in expected.items()}
    assert_gradients(model, expected, tolerance=1e-12)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("who", ["optimizer", "model", "nobody"])
def test_zero_grad_of_any_kind_changes_nothing(set_to_none, who):
    model, data = mlp(torch.float64), examples(8, torch.float64)
    _, model, optimizer, loader = familiar(model, data)
    for _ in range(2):
        for inputs, labels in loader:
            expected = clipped_mean(model, data)
            if who != "nobody":
                (optimizer if who == "optimizer" else model).zero_grad(set_to_none=set_to_none)
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            assert_gradients(model, expected, tolerance=1e-12)


def test_sequence_first_recurrent_models():
    from opacus.layers import DPLSTM

    class Reader(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            self.lstm, self.head = DPLSTM(D, 3, batch_first=batch_first), nn.Linear(3, 2)
            self.last = (slice(None), -1) if batch_first else -1

        def forward(self, inputs):
            return self.head(self.lstm(inputs)[0][self.last])

    torch.manual_seed(0)
    inputs, labels = torch.randn(6, 5, D), torch.randint(0, 2, (6,))
    states = None
    for batch_first in (True, False):
        model = Reader(batch_first)
        states = states or copy.deepcopy(model.state_dict())
        model.load_state_dict(states)

        def collate(rows, batch_first=batch_first):
            x, y = torch.utils.data.default_collate(rows)
            return (x if batch_first else x.transpose(0, 1).contiguous()), y

        _, model, optimizer, loader = familiar(
            model, TensorDataset(inputs, labels), batch_size=6, batch_first=batch_first, collate_fn=collate
        )
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as small:
            train(model, optimizer, small)
        if batch_first:
            expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_gradients(model, expected, tolerance=1e-6)
    assert any(value.abs().max() > 1e-3 for value in expected.values())


def test_per_layer_clipping_takes_a_list_or_one_norm():
    engine, model, optimizer, loader = familiar(max_grad_norm=[1e-3, 2e-3, 3e-3, 4e-3], clipping="per_layer")
    assert engine.training.sum.clipper.sensitivity == pytest.approx(30**0.5 * 1e-3)
    train(model, optimizer, loader)
    for p, bound in zip(model.parameters(), (1, 2, 3, 4), strict=True):
        assert 0 < p.grad.norm() <= bound * 1e-3 * (1 + 1e-5)
    shared = familiar(clipping="per_layer", max_grad_norm=2.0)[0]
    assert shared.training.sum.clipper.sensitivity == pytest.approx(2.0)
    with pytest.raises(ValueError, match="one clip norm per group"):
        familiar(clipping="per_layer", max_grad_norm=[1.0])
    with pytest.raises(ValueError, match="expected one max_grad_norm with clipping='flat'; got"):
        familiar(max_grad_norm=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"out of flat, automatic, psac, per_layer, .*; got 'best'"):
        familiar(clipping="best")


def test_evaluation_between_steps():
    _, model, optimizer, loader = familiar(dataset=examples(30), batch_size=10, noise=1.0)
    held_out = DataLoader(examples(12), batch_size=4)
    for inputs, labels in loader:
        F.cross_entropy(model(inputs), labels).backward()
        model.eval()
        with torch.no_grad():
            for x, y in held_out:
                F.cross_entropy(model(x), y)
        model.train()
        optimizer.step()
        with torch.no_grad():
            for x, _ in held_out:
                model(x)


def test_an_error_in_the_backward_then_discard_and_retry():
    model, data = mlp(torch.float64), examples(8, torch.float64)
    expected = clipped_mean(model, data)
    engine, model, optimizer, loader = familiar(model, data)
    for inputs, labels in loader:
        F.cross_entropy(model(inputs[:5]), labels[:5]).backward()
        with pytest.raises(torch.OutOfMemoryError):
            raise torch.OutOfMemoryError
        engine.discard()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert_gradients(model, expected, tolerance=1e-12)


def test_two_engines_in_one_process():
    a, b = familiar(noise=1.0), familiar(noise=2.0)
    for engine, model, optimizer, loader in (a, b, a):
        train(model, optimizer, loader)
        assert engine.noise_multiplier in (1.0, 2.0)
    assert [e.training.ledger.num_charges for e in (a[0], b[0])] == [2, 1]
    assert not torch.equal(a[1][0].weight.grad, b[1][0].weight.grad)
    with pytest.raises(RuntimeError, match="expected an engine in use"):
        PrivacyEngine().get_epsilon(1e-5)


def test_a_deep_copy_of_the_attached_model_is_an_ordinary_model():
    engine, model, optimizer, loader = familiar(noise=1.0)
    inputs, _ = next(iter(loader))
    twin = copy.deepcopy(model)  # before the probe, inside a step
    twin(inputs)
    assert all(p.grad is None for p in twin.parameters())
    train(model, optimizer, loader)
    twin = copy.deepcopy(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    x, y = examples(4).tensors
    assert torch.equal(twin(x), model(x)) and torch.equal(average(x), model(x))
    average.update_parameters(model)
    F.cross_entropy(twin(x), y).backward()
    assert engine.training.sum.num_added == 0 and twin[0].weight.grad is not None
    train(model, optimizer, loader)
    twin.zero_grad()
    engine_2, twin, optimizer_2, loader_2 = familiar(twin, noise=1.0)
    train(twin, optimizer_2, loader_2)
    assert [e.training.ledger.num_charges for e in (engine, engine_2)] == [2, 1]


@pytest.mark.parametrize("scheduler", ["StepLR", "OneCycleLR"])
def test_schedules_and_detach(scheduler):
    engine, model, optimizer, loader = familiar(dataset=examples(24), noise=1.0)
    options = {"StepLR": {"step_size": 1}, "OneCycleLR": {"max_lr": 0.5, "total_steps": 4}}[scheduler]
    schedule = getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **options)
    rates = []
    for inputs, labels in loader:
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    assert len(set(rates)) == 3
    with engine:
        pass
    model.zero_grad()
    assert leftovers(model, optimizer) == []
    assert engine.get_epsilon(1e-5) > 0
    with pytest.raises(RuntimeError, match="where nothing would be private"):
        next(iter(loader))
    engine.detach()


def test_epsilon_is_the_accountants_number():
    for name in ("rdp", "prv"):
        engine, model, optimizer, loader = familiar(
            dataset=examples(20), noise=1.1, batch_size=5, engine=PrivacyEngine(accountant=name)
        )
        for _ in range(2):
            train(model, optimizer, loader)
        expected = calibrate.epsilon(
            noise_multiplier=1.1, sampling_rate=1 / 4, steps=8, delta=1e-5, accountant=name
        )
        assert engine.get_epsilon(1e-5) == engine.accountant.get_epsilon(delta=1e-5)
        assert engine.get_epsilon(delta=1e-5) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["rdp", "prv"])
def test_make_private_with_epsilon_meets_its_target_and_stops(name):
    model, engine = mlp(), PrivacyEngine(accountant=name)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(examples(30), batch_size=7),
        target_epsilon=3.0,
        target_delta=1e-5,
        epochs=3,
        max_grad_norm=1.0,
    )
    for _ in range(3):
        train(model, optimizer, loader)
    assert 0.97 * 3 < engine.get_epsilon(1e-5) <= 3
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(BudgetExhausted):
        for _ in range(3):
            before = [p.detach().clone() for p in model.parameters()]
            inputs, labels = next(iter(loader))
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert engine.get_epsilon(1e-5) <= 3


@pytest.mark.parametrize("rate", [1, 2, 3, 7, 20, 49, 98])
def test_a_calibrated_budget_affords_every_planned_step(rate, tmp_path):
    for epsilon, epochs in ((0.7, 1), (3.0, 2), (8.0, 5)):
        model = nn.Linear(D, 2)
        engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / f"{epsilon}")
        engine.make_private_with_epsilon(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(examples(rate * 2), batch_size=2), target_epsilon=epsilon,
            target_delta=1e-5, epochs=epochs, max_grad_norm=1.0,
        )  # fmt: skip
        assert engine.training.steps_left >= rate * epochs
        engine.detach()
