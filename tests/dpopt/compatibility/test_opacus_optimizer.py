# SPDX-License-Identifier: Apache-2.0
"""What scripts written for Opacus read and call on the optimizer, and that nothing of it stays or travels."""

import copy
import gc
import io
import pickle
import weakref

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.schedulers import StepNoise as TheirStepNoise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpopt import BatchMemoryManager, PrivacyEngine, PrivateTraining
from dpopt.compatibility.private_optimizer import attached_to
from dpopt.guards import step_order
from tests.support.dpopt.private_runs import D, examples, explicit, familiar, leftovers, losses_of, mlp, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]
NUMBERS = ("noise_multiplier", "max_grad_norm", "expected_batch_size", "loss_reduction")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_numbers_are_those_of_opacus(reduction):
    found = []
    for library in (PrivacyEngine, opacus.PrivacyEngine):
        model = nn.Linear(D, 3)
        made = library().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_reduction=reduction,
            data_loader=DataLoader(examples(103), batch_size=10), noise_multiplier=1.25, max_grad_norm=0.5,
            criterion=nn.CrossEntropyLoss(reduction=reduction),
        )  # fmt: skip
        found.append([getattr(made[1], name) for name in NUMBERS])
    assert found[0] == found[1] == [1.25, 0.5, 9, reduction]


def test_the_optimizer_is_its_own_and_stays_one_for_copies_and_pickles():
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = optimizer.state_dict()
    engine, model, optimizer, loader = familiar(model, examples(16), optimizer=optimizer, noise=1.0)
    assert optimizer.original_optimizer is optimizer and optimizer.accumulated_iterations == 1
    assert optimizer.state_dict() == before
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not hasattr(twin, "noise_multiplier") and not hasattr(twin, "original_optimizer")
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer))
    train(model, optimizer, loader)
    engine.detach()
    model.zero_grad()
    assert leftovers(model, optimizer) == [] and type(optimizer) is torch.optim.Adam
    with pytest.raises(ValueError, match="expected the optimizer of an open private run"):
        attached_to(optimizer)


def test_names_that_the_optimizer_has_stay_its_own():
    class Named(torch.optim.SGD):
        max_grad_norm = "mine"

    model = mlp()
    optimizer = Named(model.parameters(), lr=0.1)
    optimizer.expected_batch_size = "mine too"
    engine, model, optimizer, loader = familiar(model, optimizer=optimizer, noise=1.0)
    train(model, optimizer, loader)
    assert (optimizer.max_grad_norm, optimizer.expected_batch_size) == ("mine", "mine too")
    assert optimizer.noise_multiplier == 1.0
    engine.detach()
    assert optimizer.expected_batch_size == "mine too" and not hasattr(optimizer, "noise_multiplier")


@pytest.mark.parametrize("name", NUMBERS)
def test_a_written_number_is_refused_before_anything_is_charged(name):
    engine, model, optimizer, loader = familiar(noise=1.0)
    inputs, labels = next(iter(loader))
    F.cross_entropy(model(inputs), labels).backward()
    setattr(optimizer, name, 0.25)
    with pytest.raises(RuntimeError, match=rf"expected optimizer.{name} to be read only"):
        optimizer.step()
    assert engine.training.ledger.num_charges == 0 and all(p.grad is None for p in model.parameters())
    optimizer.step()  # it was put back
    assert engine.training.ledger.num_charges == 1


def test_a_scheduler_of_opacus_itself_is_refused_with_ours_as_the_way():
    engine, model, optimizer, loader = familiar(dataset=examples(16), noise=1.0)
    schedule = TheirStepNoise(optimizer, step_size=1, gamma=0.5)
    schedule.step()
    with pytest.raises(RuntimeError, match=r"one of those in dpopt, such as LambdaNoise"):
        train(model, optimizer, loader)
    assert engine.training.ledger.num_charges == 0


def test_a_step_hook_sees_the_release_before_the_step():
    engine, model, optimizer, loader = familiar(dataset=examples(16), noise=1.0)
    counted = opacus.accountants.RDPAccountant()
    count = counted.get_optimizer_hook_fn(sample_rate=1 / 2)
    seen = []

    def hook(given):
        assert given is optimizer and engine.training.ledger.num_charges == len(seen) + 1
        seen.append((model[0].weight.clone(), model[0].weight.grad.clone()))
        count(given)

    optimizer.attach_step_hook(engine.accountant.get_optimizer_hook_fn(sample_rate=1 / 2))  # does nothing
    optimizer.attach_step_hook(hook)
    start = model[0].weight.clone()
    train(model, optimizer, loader)
    assert len(seen) == 2 and torch.equal(seen[0][0], start)
    torch.testing.assert_close(seen[1][0], start - 0.1 * seen[0][1])
    assert counted.history == engine.accountant.history == [(1.0, 0.5, 2)]


def test_signal_skip_step_holds_parts_of_a_batch_as_in_opacus():
    released = []
    for by_hand in (True, False):
        engine, model, optimizer, loader = familiar(mlp(torch.float64), examples(8, torch.float64))
        for inputs, labels in loader:
            parts = list(zip(inputs.split(3), labels.split(3), strict=True))
            for number, (x, y) in enumerate(parts):
                F.cross_entropy(model(x), y).backward()
                if by_hand:
                    optimizer.signal_skip_step(do_skip=number < len(parts) - 1)
                    optimizer.step()
                    optimizer.zero_grad() if number < len(parts) - 1 else None
                else:
                    optimizer.virtual_step()
            optimizer.step() if not by_hand else None
        assert engine.training.ledger.num_charges == 1
        released.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(released[0], released[1], rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="got one outside a step"):
        optimizer.virtual_step()


def test_a_skipped_step_on_a_whole_batch_is_refused_at_the_next_draw():
    _, model, optimizer, loader = familiar(dataset=examples(16), noise=1.0)
    batches = iter(loader)
    inputs, labels = next(batches)
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.signal_skip_step()
    optimizer.step()
    with pytest.raises(
        RuntimeError, match=r"expected step\(\) of the private optimizer on every drawn batch"
    ):
        next(batches)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(D, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def test_a_second_optimizer_that_steps_first_is_refused_and_second_works():
    model = Parts()
    other = torch.optim.Adam(model.head.parameters(), lr=0.1)
    mine = torch.optim.SGD(model.body.parameters(), lr=0.1)
    engine, model, mine, loader = familiar(model, examples(16), optimizer=mine, noise=1.0)
    inputs, labels = next(iter(loader))
    F.cross_entropy(model(inputs), labels).backward()
    with pytest.raises(RuntimeError, match=r"got the step of a Adam over 2 of them, .*; swap the two lines"):
        other.step()
    head = model.head.weight.clone()
    mine.step()
    other.step()
    assert not torch.equal(head, model.head.weight) and engine.training.ledger.num_charges == 1
    # With public gradients it may step at any time; so may an optimizer of something else.
    next(iter(loader))
    for p in model.head.parameters():
        p.grad = torch.ones_like(p)
    other.step()
    other.zero_grad()
    away = nn.Linear(2, 2)
    torch.optim.SGD(away.parameters(), lr=0.1).step()
    engine.detach()
    other.step()


def test_the_order_is_watched_at_the_explicit_door_too():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explicit(model, noise=1.0) as private:
        for batch in private.batches(list(examples(8)), steps=2):
            optimizer.zero_grad()
            private.accumulate(losses_of(model, batch.examples))
            with pytest.raises(RuntimeError, match=r"expected release\(\) before any other optimizer steps"):
                optimizer.step()
            private.release()
            optimizer.step()
            assert private.order in step_order._ATTACHED
    assert private.order not in step_order._ATTACHED


def test_parts_that_are_held_let_every_optimizer_step():
    model = Parts()
    other = torch.optim.Adam(model.head.parameters(), lr=0.1)
    mine = torch.optim.SGD(model.body.parameters(), lr=0.1)
    engine, model, mine, loader = familiar(model, examples(8), optimizer=mine, noise=1.0)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=mine) as small:
        for inputs, labels in small:
            F.cross_entropy(model(inputs), labels).backward()
            mine.step()
            other.step()
    assert engine.training.ledger.num_charges == 1


def test_an_engine_that_nobody_holds_any_more_ends_and_gives_its_ledger_back(tmp_path):
    def run():
        engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "ledger")
        engine, model, optimizer, loader = familiar(engine=engine, noise=1.0)
        train(model, optimizer, loader)
        return weakref.ref(engine), engine.training.ledger.num_charges

    first, charged = run()
    assert charged == 1
    held, charged = run()  # on the same ledger: the first is collected when it is in the way
    assert first() is None and charged == 2
    gc.collect()
    assert held() is None
    alive = PrivacyEngine(accountant="rdp", ledger=tmp_path / "ledger")
    familiar(engine=alive, noise=1.0)
    with pytest.raises(
        RuntimeError, match=r"another engine of this process .*; call detach\(\) on that engine"
    ):
        familiar(engine=PrivacyEngine(accountant="rdp", ledger=tmp_path / "ledger"), noise=1.0)
    alive.detach()
    familiar(engine=PrivacyEngine(accountant="rdp", ledger=tmp_path / "ledger"), noise=1.0)


def test_the_noise_of_a_sum_is_that_of_opacus_and_told():
    """loss_reduction="sum": noise of standard deviation sigma * C on the sum, not divided by anything."""
    torch.manual_seed(0)
    model = nn.Linear(400, 50, bias=False)
    data = TensorDataset(torch.zeros(20, 400), torch.zeros(20, dtype=torch.long))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(data, batch_size=5), loss_reduction="sum",
        noise_multiplier=2.0, max_grad_norm=0.5,
    )  # fmt: skip
    for x, y in loader:
        F.cross_entropy(model(x), y, reduction="sum").backward()
        optimizer.step()
        assert float(model.weight.grad.std()) == pytest.approx(1.0, rel=0.05)
        assert engine.training.noise_stds["weight"] == pytest.approx(1.0)
    assert isinstance(engine.training, PrivateTraining)
