# SPDX-License-Identifier: Apache-2.0
"""Runs that nobody ended: a notebook cell run again, a copy, a pickle."""

import copy
import io

import pytest
import torch
from torch import nn

import dpopt
from dpopt import PrivacyEngine
from tests.support.dpopt.private_runs import examples, explicit, familiar, leftovers, mlp, train


@pytest.mark.parametrize("door", ["explicit", "familiar"])
def test_a_run_whose_engine_is_lost_is_ended_by_its_model(door, tmp_path):
    model, ledger = mlp(), tmp_path / "run.jsonl"

    def cell():
        if door == "explicit":
            explicit(model, noise=1.0, ledger=ledger).__enter__()
        else:
            _, same, optimizer, loader = familiar(
                model, noise=1.0, engine=PrivacyEngine(accountant="rdp", ledger=ledger)
            )
            train(same, optimizer, loader)

    dpopt.detach(model)  # nothing is open yet
    cell()
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match=r"a notebook cell is run again; .*dpopt.detach\(model\)"):
        cell()
    assert sorted(tmp_path.rglob("*")) == files
    dpopt.detach(model)
    model.zero_grad()
    assert leftovers(model) == []
    cell()  # the ledger is free again
    dpopt.detach(model)


def test_a_run_is_found_from_the_model_around_it_and_not_from_a_copy():
    _, model, optimizer, loader = familiar(noise=1.0)
    around, twin = nn.Sequential(model), copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="expected a model without an open run"):
        familiar(around, optimizer=torch.optim.SGD(around.parameters(), lr=0.1))
    dpopt.detach(twin)
    train(model, optimizer, loader)
    engine_2, twin, optimizer_2, loader_2 = familiar(twin, noise=1.0)
    train(twin, optimizer_2, loader_2)
    dpopt.detach(around)
    with pytest.raises(RuntimeError, match="where nothing would be private"):
        next(iter(loader))
    train(twin, optimizer_2, loader_2)
    engine_2.detach()


def test_the_optimizer_of_a_lost_run_is_an_ordinary_one_again():
    _, model, optimizer, loader = familiar(noise=1.0)
    train(model, optimizer, loader)
    dpopt.detach(model)
    x, y = examples(4).tensors
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    assert leftovers(model, optimizer) == []


def test_weights_are_saved_while_a_run_is_open_and_the_model_is_not():
    engine, model, optimizer, loader = familiar(noise=1.0)
    train(model, optimizer, loader)
    with pytest.raises(TypeError, match=r"save model.state_dict\(\), or "):
        torch.save(model, io.BytesIO())
    kept = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, kept)
    kept.seek(0)
    states, other = torch.load(kept), mlp()
    other.load_state_dict(states["model"])
    engine.detach()
    torch.save(model, io.BytesIO())


def test_a_ledger_that_another_run_holds_is_named_with_the_way(tmp_path):
    path = tmp_path / "run.jsonl"
    engine, *_ = familiar(engine=PrivacyEngine(accountant="rdp", ledger=path))
    with pytest.raises(RuntimeError, match=r"another engine of this process .*call detach\(\)"):
        familiar(engine=PrivacyEngine(accountant="rdp", ledger=path))
    engine.detach()
    familiar(engine=PrivacyEngine(accountant="rdp", ledger=path))[0].detach()


class Holding(nn.Module):
    """A module that keeps its engine, optimizer and loader, as modules of Lightning do."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.engine, _, self.optimizer, self.loader = familiar(self.net, noise=1.0)


def test_a_copy_of_what_holds_an_engine_shares_its_run():
    module = Holding()
    train(module.net, module.optimizer, module.loader)
    twin = copy.deepcopy(module)
    assert twin.engine is module.engine and twin.net is not module.net
    with torch.no_grad():
        assert torch.equal(*(m.net(torch.ones(2, 4)) for m in (module, twin)))
    train(module.net, module.optimizer, module.loader)
    assert module.engine.training.ledger.num_charges == 2
    module.engine.detach()
