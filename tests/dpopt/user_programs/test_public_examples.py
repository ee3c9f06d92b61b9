# SPDX-License-Identifier: Apache-2.0
"""Ordinary steps on public examples between private ones, on the same model and optimizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from dpopt import MixesExamples, UnrecordedParameter
from tests.support.dpopt.private_runs import (
    D,
    assert_gradients,
    clipped_mean,
    examples,
    explicit,
    familiar,
    losses_of,
    mlp,
)

FLOAT = torch.float64


def public(num=5):
    generator = torch.Generator().manual_seed(9)
    return torch.randn(num, D, generator=generator, dtype=FLOAT), torch.arange(num) % 3


def plain(model, inputs, labels):
    """By name: the ordinary gradient."""
    model = copy.deepcopy(model)
    model.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("first", ["private", "public"])
def test_guarantee_public_examples_and_private_ones_never_share_a_step(first):
    """Each step has the gradient of its own examples, and private steps alone are charged."""
    model, data = mlp(FLOAT), examples(8, FLOAT)
    x, y = public()
    engine, model, optimizer, loader = familiar(model, data)

    def private_step(inputs, labels):
        expected = clipped_mean(model, data)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        assert_gradients(model, expected, tolerance=1e-12)

    def public_step():
        expected = plain(model, x, y)
        with engine.public_examples():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            before = model[0].weight.detach().clone()
            optimizer.step()
            assert not torch.equal(model[0].weight, before)
        assert_gradients(model, expected, tolerance=1e-12)
        assert set(engine.training.noise_stds.values()) == {0.0}

    public_step()  # before any draw
    for _ in range(2):
        for inputs, labels in loader:
            if first == "public":
                public_step()
            private_step(inputs, labels)
            if first == "private":
                public_step()
    assert engine.training.ledger.num_charges == engine.training.steps == 2
    engine.detach()


def test_the_explicit_door_has_the_same_block():
    model, data = mlp(FLOAT), examples(8, FLOAT)
    x, y = public()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explicit(model) as private:
        for batch in private.batches(data, steps=2):
            expected = clipped_mean(model, data)
            private.accumulate(losses_of(model, batch.examples))
            private.release()
            assert_gradients(model, expected, tolerance=1e-12)
            both = {name: expected[name] + value for name, value in plain(model, x, y).items()}
            with private.public_examples():
                F.cross_entropy(
                    model(x), y
                ).backward()  # added to the released gradient, as .grad was not zeroed
            assert_gradients(model, both, tolerance=1e-12)
            optimizer.step()
        assert private.ledger.num_charges == 2
    with pytest.raises(RuntimeError, match="expected an open run"):
        private.public_examples().__enter__()


@pytest.mark.parametrize("how", ["backward", "same_examples", "torn"])
def test_a_block_does_not_begin_while_private_gradients_are_pending(how):
    model, data = mlp(FLOAT), examples(8, FLOAT)
    expected = clipped_mean(model, data)
    engine, model, optimizer, loader = familiar(model, data)
    for inputs, labels in loader:
        if how == "same_examples":
            with engine.same_examples(), pytest.raises(RuntimeError, match="same_examples"):
                engine.public_examples().__enter__()
        else:
            F.cross_entropy(model(inputs), labels).backward()
            engine.training.sum.admission.unfinished = int(how == "torn")
            text = "failed backward" if how == "torn" else "no private gradients to be pending"
            with pytest.raises(RuntimeError, match=text):
                engine.public_examples().__enter__()
            engine.discard()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert_gradients(model, expected, tolerance=1e-12)
    engine.detach()


def test_a_forward_does_not_cross_the_border_of_a_block():
    model, data = mlp(FLOAT), examples(8, FLOAT)
    x, y = public()
    engine, model, optimizer, loader = familiar(model, data)
    for inputs, labels in loader:
        loss = F.cross_entropy(model(inputs), labels)
        with pytest.raises(RuntimeError, match="expected nothing to record while paused"):
            with engine.public_examples():
                F.cross_entropy(model(x), y).backward()
                loss.backward(retain_graph=True)
        assert all(p.grad is None for p in model.parameters())  # whatever the failed backward left
        with pytest.raises(RuntimeError, match="or before a public step"):
            loss.backward()
        with engine.public_examples():
            inside = F.cross_entropy(model(x), y)
        with pytest.raises(UnrecordedParameter):
            inside.backward()
        expected = clipped_mean(model, data)
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        assert_gradients(model, expected, tolerance=1e-12)
    engine.detach()


def test_a_failure_in_a_block_leaves_the_run_as_it_was():
    model, data = mlp(FLOAT), examples(8, FLOAT)
    x, y = public()
    engine, model, optimizer, loader = familiar(model, data)
    for inputs, labels in loader:
        with pytest.raises(KeyboardInterrupt), engine.public_examples():
            F.cross_entropy(model(x), y).backward()
            raise KeyboardInterrupt
        assert all(p.grad is None for p in model.parameters())
        expected = clipped_mean(model, data)
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        assert_gradients(model, expected, tolerance=1e-12)
    engine.detach()


class Counting(nn.Module):
    """Writes a sum of its inputs into a buffer that is saved."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 3)
        self.register_buffer("seen", torch.zeros(D))

    def forward(self, x):
        self.seen += x.detach().sum(0).float()
        return self.layer(x)


def test_a_buffer_that_private_examples_changed_is_not_taken_for_public():
    model = Counting().to(FLOAT)
    x, y = public()
    engine, model, optimizer, loader = familiar(model, examples(8, FLOAT), noise=1.0)
    with engine.public_examples():
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    inputs, labels = next(iter(loader))
    held = model.seen.clone()
    loss = F.cross_entropy(model(inputs), labels)
    with pytest.raises(RuntimeError, match="expected buffers that do not change"):
        engine.public_examples().__enter__()
    model.seen.copy_(held)  # what public examples wrote stays
    loss.backward()
    optimizer.step()
    assert engine.training.ledger.num_charges == 1
    engine.detach()


class Direct(nn.Module):
    """What the private side refuses: a parameter used outside its module, examples mixed, token labels, two orders."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 3)

    def forward(self, x, labels=None):
        logits = x @ self.layer.weight.T - self.layer(x).mean(0)
        return logits if labels is None else F.cross_entropy(logits, labels[:, 0])


def test_anything_goes_inside():
    x, y = public()
    model = Direct().to(FLOAT)
    engine, model, optimizer, loader = familiar(model, examples(8, FLOAT), noise=1.0)
    with engine.public_examples():

        def closure():
            optimizer.zero_grad()
            leaf = x.clone().requires_grad_()
            loss = model(leaf, labels=y[:, None])
            (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
            (loss + slope.square().sum()).backward()
            return loss

        optimizer.step(closure)
        with pytest.raises(ValueError, match="got a GradScaler"):
            optimizer.grad_scale = torch.ones(())  # as a scaler says it
            optimizer.step()
    inputs, labels = next(iter(loader))
    with pytest.raises(ValueError, match="no token labels"):
        model(inputs, labels=labels[:, None])
    with pytest.raises((MixesExamples, RuntimeError)):
        F.cross_entropy(model(inputs), labels).backward()
    engine.detach()


def test_blocks_do_not_nest_with_a_pause():
    engine, *_ = familiar(mlp(), TensorDataset(*examples(8).tensors))
    with engine.public_examples(), pytest.raises(RuntimeError, match="got one paused already"):
        engine.paused().__enter__()
    with engine.paused(), pytest.raises(RuntimeError, match="got one paused already"):
        engine.public_examples().__enter__()
    engine.detach()
