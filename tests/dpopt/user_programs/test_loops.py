# SPDX-License-Identifier: Apache-2.0
"""Loops that people write around a private step, and the data that they bring."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from dpopt import PrivacyEngine
from tests.support.dpopt.private_runs import (
    assert_gradients,
    clipped_mean,
    examples,
    explicit,
    familiar,
    losses_of,
    mlp,
    train,
)

FLOAT = torch.float64


# -- gradients for inputs ---------------------------------------------------------------------------------------


def attacked(model, inputs, labels, how, engine):
    """FGSM: one step of the inputs uphill."""
    leaf = inputs.clone().requires_grad_()
    with engine.paused() if how == "paused" else nullcontext():
        loss = F.cross_entropy(model(leaf), labels)
        if how == "grad":
            (slope,) = torch.autograd.grad(loss, leaf)
        else:
            loss.backward(inputs=[leaf] if how == "inputs" else None)
            slope = leaf.grad
    return inputs + 0.1 * slope.sign()


@pytest.mark.parametrize("how", ["grad", "inputs", "paused"])
def test_a_gradient_for_inputs_counts_nobody(how):
    model, data = mlp(FLOAT), examples(8, FLOAT)
    engine, model, optimizer, loader = familiar(model, data)
    for _ in range(2):
        for inputs, labels in loader:
            plain = copy.deepcopy(model)
            leaf = inputs.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(plain(leaf), labels), leaf)
            moved = attacked(model, inputs, labels, how, engine)
            torch.testing.assert_close(moved, inputs + 0.1 * slope.sign())
            assert engine.training.sum.num_added == 0
            expected = clipped_mean(model, TensorDataset(moved, labels))
            F.cross_entropy(model(moved), labels).backward()
            attacked(model, inputs, labels, "grad", engine)  # with gradients pending
            optimizer.step()
            assert_gradients(model, expected, tolerance=1e-12)
    x, y = examples(3, FLOAT).tensors
    attacked(model, x, y, how, engine)  # outside a step
    engine.detach()


def test_a_gradient_for_inputs_in_the_explicit_door():
    model, data = mlp(FLOAT), examples(8, FLOAT)
    expected = clipped_mean(model, data)
    with explicit(model) as private:
        for batch in private.batches(data, steps=1):
            losses = losses_of(model, batch.examples)
            leaf = torch.stack([x for x, _ in batch.examples]).requires_grad_()
            torch.autograd.grad(model(leaf).sum(), leaf, retain_graph=True)
            assert private.sum.num_added == 0
            private.accumulate(losses)
            private.release()
    assert_gradients(model, expected, tolerance=1e-12)


@pytest.mark.parametrize("second", ["the attack's backward()", "a second loss", "fakes in the batch"])
def test_what_comes_twice_is_told_the_block_that_serves(second):
    engine, model, _, loader = familiar(noise=1.0)
    inputs, labels = next(iter(loader))
    with pytest.raises(
        RuntimeError, match=r"inside same_examples\(\); .*inside paused\(\); .*public_examples\(\)"
    ):
        if second == "fakes in the batch":
            model(torch.cat([inputs, torch.randn_like(inputs)])).square().mean().backward()
        for _ in range(2):
            F.cross_entropy(model(inputs.clone().requires_grad_()), labels).backward()
    with pytest.raises(RuntimeError, match=r"expected a backward of first order; .*difference quotient"):
        leaf = inputs.clone().requires_grad_()
        torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
    engine.detach()


# -- several passes over the same examples ----------------------------------------------------------------------


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x, state=None):
        hidden, state = self.lstm(x, state)
        return self.head(hidden), state


def chunked(model, x):
    """Truncated backpropagation: the loss of each chunk, whose first state is a constant."""
    state = None
    for chunk in x.split(3, 1):
        outputs, state = model(chunk, state)
        yield F.mse_loss(outputs, chunk, reduction="none").mean((1, 2))
        state = tuple(s.detach() for s in state)


def test_truncated_backpropagation_is_one_loss_of_the_same_examples():
    torch.manual_seed(0)
    model, x = Reader().to(FLOAT), torch.randn(6, 9, 2, dtype=FLOAT)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in x:
        plain = copy.deepcopy(model)
        for losses in chunked(plain, row[None]):
            losses.sum().backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in plain.parameters()))
        for name, p in plain.named_parameters():
            expected[name] += p.grad * min(1.0, 0.05 / float(norm)) / 6
    engine, model, optimizer, loader = familiar(model, TensorDataset(x), batch_size=6, max_grad_norm=0.05)
    for (rows,) in loader:
        with engine.same_examples():
            for losses in chunked(model, rows):
                losses.mean().backward()
        optimizer.step()
    assert_gradients(model, expected, tolerance=1e-10)
    engine.detach()


# -- loops that stop, look or begin again -----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["draw", "forward", "backward", "step"])
def test_an_interrupted_cell_is_run_again(where):
    model, data = mlp(FLOAT), examples(8, FLOAT)
    engine, model, optimizer, loader = familiar(model, data)

    def interrupt(*_):
        raise KeyboardInterrupt

    def cell(interrupted):
        for inputs, labels in loader:
            if where == "draw" and interrupted:
                raise KeyboardInterrupt
            hook = model[1].register_forward_hook(interrupt) if where == "forward" and interrupted else None
            try:
                loss = F.cross_entropy(model(inputs), labels)
            finally:
                _ = hook and hook.remove()
            if where == "backward" and interrupted:
                loss.register_hook(interrupt)
            loss.backward()
            if where == "step" and interrupted:
                raise KeyboardInterrupt
            optimizer.step()

    with pytest.raises(KeyboardInterrupt):
        cell(True)
    if where == "step":
        with pytest.raises(
            RuntimeError, match=r"call discard\(\) to give it up, as after an interrupted cell"
        ):
            cell(False)
        engine.discard()
    expected = clipped_mean(model, data)
    cell(False)
    assert_gradients(model, expected, tolerance=1e-12)
    assert engine.training.ledger.num_charges == 1
    engine.detach()


def test_epochs_that_are_left_in_the_middle_and_peeks_cost_what_they_release():
    engine, model, optimizer, loader = familiar(dataset=examples(40), batch_size=5, noise=1.0)
    next(iter(loader))
    for stop in (1, 3):
        for i, (inputs, labels) in enumerate(loader):
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            if i + 1 == stop:
                break
    with torch.no_grad():
        assert sum(1 for _ in loader) == 8
    assert engine.training.ledger.num_charges == 4
    engine.detach()


def test_averages_and_copies_of_the_weights_follow_the_private_model():
    engine, model, optimizer, loader = familiar(noise=1.0)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    x, y = examples(4).tensors
    for _ in range(3):
        train(model, optimizer, loader)
        average.update_parameters(model)
        schedule.step()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert average(x).isfinite().all() and torch.equal(twin(x), model(x))
    before = engine.training.ledger.num_charges
    F.cross_entropy(twin(x), y).backward()  # a copy learns from public examples as any model
    assert twin[0].weight.grad is not None and engine.training.ledger.num_charges == before == 3
    engine.detach()


# -- data of all kinds ------------------------------------------------------------------------------------------


class Mapping(Dataset):
    """Rows as of a table: dictionaries with None and text, fetched many at a time."""

    def __init__(self, num):
        self.rows = [{"x": x, "y": int(y), "text": None if y else "some"} for x, y in examples(num)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def __getitems__(self, indices):
        assert indices, "an empty list of indices"
        return [self.rows[i] for i in indices]


def gathered(rows):
    return {"x": torch.stack([r["x"] for r in rows]), "y": torch.tensor([r["y"] for r in rows]), "rest": [r["text"] for r in rows]}  # fmt: skip


@pytest.mark.parametrize("kind", ["mapping", "subset", "concatenated", "drop_last"])
def test_datasets_of_all_kinds(kind):
    data = {
        "subset": Subset(Mapping(9), [1, 2, 3, 5]),
        "concatenated": ConcatDataset([Mapping(3), Mapping(4)]),
    }
    engine = PrivacyEngine(accountant="rdp")
    model = mlp()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=DataLoader(data.get(kind, Mapping(9)), batch_size=2, collate_fn=gathered, drop_last=kind == "drop_last"),
    )  # fmt: skip
    for _ in range(6):
        for batch in loader:
            F.cross_entropy(model(batch["x"]), batch["y"]).backward()
            optimizer.step()
    assert engine.training.ledger.num_charges == 6 * len(loader)
    engine.detach()


class Moving(DataLoader):
    """A loader that does work of its own between the workers and the loop."""

    def __iter__(self):
        return ((x.double(), y) for x, y in super().__iter__())


def test_a_loader_that_iterates_in_its_own_way_is_refused():
    model = mlp()
    with pytest.raises(ValueError, match=r"got Moving, whose own __iter__ .*collate_fn or in the loop"):
        PrivacyEngine(accountant="rdp").make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0,
            max_grad_norm=1.0, data_loader=Moving(examples(8), batch_size=2),
        )  # fmt: skip
