# SPDX-License-Identifier: Apache-2.0
"""Private loaders: parts of a draw, empty draws, dictionaries, workers."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from dpopt import BatchMemoryManager
from tests.support.dpopt.private_runs import D, assert_gradients, clipped_mean, examples, familiar, mlp, train


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_the_batch_memory_manager_equals_none(size):
    model, data = mlp(torch.float64), examples(8, torch.float64)
    expected = clipped_mean(model, data)
    start = [p.detach().clone() for p in model.parameters()]
    engine, model, optimizer, loader = familiar(model, data)
    optimizer.param_groups[0]["weight_decay"] = 0.1  # would move the weights at every physical step
    num_physical = 0
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=size, optimizer=optimizer) as small:
        assert len(small) == -(-8 // size)
        for inputs, labels in small:
            num_physical += 1
            assert len(inputs) <= size
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            if num_physical < -(-8 // size):
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert num_physical == -(-8 // size) and engine.training.ledger.num_charges == 1
    decay = dict(zip(expected, start, strict=True))
    assert_gradients(model, expected, tolerance=1e-12)  # torch adds the decay to the update, not to .grad
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, decay[name] - 0.1 * (expected[name] + 0.1 * decay[name]))


def test_the_batch_memory_manager_left_in_the_middle():
    engine, model, optimizer, loader = familiar(noise=1.0)
    manager = BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer)
    with manager as small:
        for inputs, labels in small:
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            break
    assert engine.training.ledger.num_charges == 0 and not engine.training.sum.hold
    assert all(p.grad is None for p in model.parameters())
    train(model, optimizer, loader)
    assert engine.training.ledger.num_charges == 1
    with pytest.raises(ValueError, match="expected the data loader that make_private returned"):
        BatchMemoryManager(
            data_loader=DataLoader(examples(8)), max_physical_batch_size=3, optimizer=optimizer
        )
    with pytest.raises(ValueError, match="max_physical_batch_size >= 1"):
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=0, optimizer=optimizer)


def test_every_draw_is_a_step_of_noise_and_no_batch_is_empty():
    dataset = examples(30)
    engine, model, optimizer, loader = familiar(dataset=dataset, batch_size=1, noise=1.0)
    sizes, blanks = [], []
    for inputs, labels in loader:
        sizes.append(len(inputs))
        blanks.append(engine.training.sum.blank)
        assert inputs.shape[1:] == (D,) and labels.dtype == torch.int64
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        assert all(p.grad.any() and p.grad.isfinite().all() for p in model.parameters())
    assert all(sizes) and any(blanks) and not all(blanks)  # see test_blank_draws
    assert engine.training.ledger.num_charges == len(sizes) == 30


@pytest.mark.parametrize("physical", [None, 2])
def test_datasets_of_dictionaries(physical):
    rows = [{"x": x, "y": int(y), "name": f"record {i}"} for i, (x, y) in enumerate(examples(9))]
    engine, model, optimizer, loader = familiar(dataset=rows, batch_size=2, noise=1.0)
    manager = BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=physical or 99, optimizer=optimizer
    )
    with manager as small:
        for batch in small:
            F.cross_entropy(model(batch["x"]), batch["y"]).backward()
            optimizer.step()
    assert engine.training.ledger.num_charges == 5


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine of one core
def test_workers_fetch_ahead_and_the_counts_stay_right(persistent):
    engine, model, optimizer, loader = familiar(
        dataset=examples(30), batch_size=5, noise=1.0, num_workers=2, persistent_workers=persistent
    )
    next(iter(loader))
    for _ in range(2):
        for inputs, labels in loader:
            assert engine.training.sum.num_drawn == len(inputs)
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as small:
        train(model, optimizer, small)
    assert engine.training.ledger.num_charges == 18


def test_parts_of_a_draw_never_apply_the_last_release_again():
    """Without any zero_grad, the weights rest until the last part of each draw."""
    engine, model, optimizer, loader = familiar(noise=1.0)
    for _ in range(2):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as small:
            before = [p.detach().clone() for p in model.parameters()]
            moved = []
            for inputs, labels in small:
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                moved.append(not torch.equal(model[0].weight, before[0]))
            assert moved == [False, False, True]
    assert engine.training.ledger.num_charges == 2
