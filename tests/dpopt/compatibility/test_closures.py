# SPDX-License-Identifier: Apache-2.0
"""`optimizer.step(closure)`: the closure runs once, before the release, and nothing else of the batch is asked."""

import pytest
import torch
import torch.nn.functional as F

from dpopt import BatchMemoryManager, FlatClipper, GaussianMechanism, PrivateTraining, poisson
from tests.support.dpopt.private_runs import (
    assert_gradients,
    clipped_mean,
    examples,
    familiar,
    leftovers,
    mlp,
)

FLOAT = torch.float64
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "RMSprop": torch.optim.RMSprop,
    "Adafactor": torch.optim.Adafactor,
    "LBFGS of one iteration": lambda p: torch.optim.LBFGS(p, max_iter=1, history_size=2),
}


def closing(model, optimizer, inputs, labels, calls=None):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        if calls is not None:
            calls.append(loss)
        return loss

    return closure


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_closure_is_a_backward_before_the_step(kind, keyword):
    model, data = mlp(FLOAT), examples(8, FLOAT)
    optimizer = OPTIMIZERS[kind](model.parameters())
    engine, model, optimizer, loader = familiar(model, data, optimizer=optimizer)
    calls = []
    for _ in range(3):
        for inputs, labels in loader:
            expected = clipped_mean(model, data)
            closure = closing(model, optimizer, inputs, labels, calls)
            with torch.no_grad():
                told = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
            assert told is calls[-1]
            assert_gradients(model, expected, tolerance=1e-12)
    assert len(calls) == engine.training.ledger.num_charges == 3
    engine.detach()
    model.zero_grad()
    assert leftovers(model, optimizer) == []


def test_closures_of_parts_rest_until_the_last():
    model, data = mlp(FLOAT), examples(8, FLOAT)
    expected = clipped_mean(model, data)
    engine, model, optimizer, loader = familiar(model, data)
    moved = []
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as small:
        for inputs, labels in small:
            before = model[0].weight.detach().clone()
            optimizer.step(closing(model, optimizer, inputs, labels))
            moved.append(not torch.equal(model[0].weight, before))
    assert moved == [False, False, True] and engine.training.ledger.num_charges == 1
    assert_gradients(model, expected, tolerance=1e-12)
    engine.detach()


def test_a_closure_that_raises_releases_nothing():
    model, data = mlp(FLOAT), examples(8, FLOAT)
    expected = clipped_mean(model, data)
    engine, model, optimizer, loader = familiar(model, data)

    def failing():
        raise ZeroDivisionError

    for inputs, labels in loader:
        with pytest.raises(ZeroDivisionError):
            optimizer.step(failing)
        with pytest.raises(RuntimeError, match="for every drawn example before"):
            optimizer.step(lambda: None)
        assert engine.training.ledger.num_charges == 0
        optimizer.step(closing(model, optimizer, inputs, labels))
    assert_gradients(model, expected, tolerance=1e-12)
    engine.detach()


@pytest.mark.parametrize("options", [{}, {"max_iter": 1, "line_search_fn": "strong_wolfe"}], ids=["iterations", "line search"])  # fmt: skip
def test_an_optimizer_of_several_gradients_is_refused_at_once(options, tmp_path):
    model = mlp()
    with pytest.raises(ValueError, match=r"got LBFGS, .*max_iter=1 and no line_search_fn"):
        familiar(model, optimizer=torch.optim.LBFGS(model.parameters(), **options))
    assert not (tmp_path / "privacy-ledgers").exists()


class Repeating(torch.optim.SGD):
    """Asks its closure at the beginning of a step and at its end."""

    def step(self, closure=None):
        first = closure()
        super().step()
        return first + closure()


class Sharpness(torch.optim.SGD):
    """SAM: a step uphill, then the gradient that is used."""

    @torch.no_grad()
    def step(self, closure=None):
        if closure is None:
            return super().step()
        self.uphill()
        with torch.enable_grad():
            loss = closure()
        self.downhill()
        return loss

    @torch.no_grad()
    def uphill(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["climbed"] = p.grad * 0.05
            p.add_(self.state[p]["climbed"])
        self.zero_grad()

    @torch.no_grad()
    def downhill(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(self.state[p]["climbed"])
        super().step()


class Scaled(torch.optim.SGD):
    """Leaves the step to its class, in two halves."""

    def step(self, closure=None):
        loss = super().step(closure)
        super().step()
        return loss


@pytest.mark.parametrize("use_closure", [False, True])
def test_a_step_that_calls_the_step_of_its_class_is_one(use_closure):
    torch.optim.SGD([torch.zeros(1)])  # from its first instance on, a class has hooks of its own
    model, data = mlp(FLOAT), examples(8, FLOAT)
    engine, model, optimizer, loader = familiar(model, data, optimizer=Scaled(model.parameters(), lr=0.1))
    for _ in range(2):
        for inputs, labels in loader:
            expected, before = clipped_mean(model, data), model[0].weight.detach().clone()
            if use_closure:
                optimizer.step(closing(model, optimizer, inputs, labels))
            else:
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
            assert_gradients(model, expected, tolerance=1e-12)
            torch.testing.assert_close(model[0].weight, before - 0.2 * expected["0.weight"])
        for _ in range(2):
            with pytest.raises(RuntimeError, match="expected a batch drawn since the last release"):
                optimizer.step()
    assert engine.training.ledger.num_charges == 2
    engine.detach()


@pytest.mark.parametrize("kind", [Repeating, Sharpness])
def test_a_second_gradient_is_refused_and_not_made_up(kind):
    model = mlp()
    engine, model, optimizer, loader = familiar(model, optimizer=kind(model.parameters(), lr=0.1), noise=1.0)
    inputs, labels = next(iter(loader))
    calls = []
    with pytest.raises(RuntimeError, match="asks its closure once a step"):
        optimizer.step(closing(model, optimizer, inputs, labels, calls))
    assert len(calls) == 1 and engine.training.ledger.num_charges == 1
    engine.detach()


def test_a_closure_after_a_backward_of_the_same_batch_is_refused():
    engine, model, optimizer, loader = familiar(noise=1.0)
    inputs, labels = next(iter(loader))
    F.cross_entropy(model(inputs), labels).backward()
    with pytest.raises(RuntimeError, match="expected each drawn example once per step"):
        optimizer.step(closing(model, optimizer, inputs, labels))
    assert engine.training.ledger.num_charges == 0
    optimizer.step(lambda: 0.0)  # a closure without a backward adds nothing to the one that has been
    assert engine.training.ledger.num_charges == 1
    engine.detach()


def test_two_gradients_a_step_are_two_batches_of_the_explicit_door():
    """The remedy that the message names."""
    model, data = mlp(FLOAT), examples(8, FLOAT)
    optimizer = Sharpness(model.parameters(), lr=0.1)
    with PrivateTraining(
        model, clipper=FlatClipper(1.0), mechanism=GaussianMechanism(0.0), accountant_name="rdp",
        sampling=poisson(num_records=8, batch_size=8),
    ) as private:  # fmt: skip
        batches = private.batches(data, steps=2)
        for act in (optimizer.uphill, optimizer.downhill):
            expected = clipped_mean(model, data)
            inputs, labels = (torch.stack(column) for column in zip(*next(batches).examples, strict=True))
            private.accumulate(F.cross_entropy(model(inputs), labels, reduction="none"))
            private.release()
            assert_gradients(model, expected, tolerance=1e-12)
            act()
        assert private.ledger.num_charges == 2


def test_arguments_that_are_no_closure_are_refused():
    engine, model, optimizer, loader = familiar(noise=1.0)
    inputs, labels = next(iter(loader))
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    calls = (
        lambda: optimizer.step(loss),
        lambda: optimizer.step(loss=loss),
        lambda: optimizer.step(None, 1.0),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"expected optimizer.step\(\) with at most a closure"):
            call()
    assert engine.training.ledger.num_charges == 0
    optimizer.step(closure=None)
    assert engine.training.ledger.num_charges == 1
    engine.detach()


class Lookahead(torch.optim.Optimizer):
    """A wrapper that never calls Optimizer.__init__, as several do."""

    def __init__(self, inner, pull=0.5):
        self.inner, self.pull = inner, pull
        self.param_groups = inner.param_groups
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    def step(self, closure=None):
        loss = self.inner.step(closure)
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for p, s in zip(group["params"], slow, strict=True):
                s.add_(p.detach() - s, alpha=self.pull)
                p.data.copy_(s)
        return loss


def test_a_wrapper_without_hooks_is_refused_and_serves_around_the_private_one():
    model, data = mlp(FLOAT), examples(8, FLOAT)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = Lookahead(inner)
    with pytest.raises(ValueError, match=r"got Lookahead, .*the optimizer that it wraps"):
        familiar(model, data, optimizer=wrapper)
    engine, model, _, loader = familiar(model, data, optimizer=inner)
    for use_closure in (False, True):
        for inputs, labels in loader:
            expected = clipped_mean(model, data)
            if use_closure:
                wrapper.step(closing(model, inner, inputs, labels))
            else:
                F.cross_entropy(model(inputs), labels).backward()
                wrapper.step()
            assert_gradients(model, expected, tolerance=1e-12)
    assert engine.training.ledger.num_charges == 2
    engine.detach()
