# SPDX-License-Identifier: Apache-2.0
"""Several runs of one engine on its one ledger, loaders that draw already, and what Opacus' modes return."""

import math

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.data_loader import DPDataLoader as TheirLoader
from torch import nn
from torch.utils.data import DataLoader

from accountants import accountant as find_accountant
from dpopt import BatchMemoryManager, BudgetExhausted, DPDataLoader, PrivacyEngine
from dpopt.opacus import UniformWithReplacementSampler
from tests.support.dpopt.private_runs import clipped_mean, examples, familiar, leftovers, mlp, train

DELTA = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG turned off")


def test_two_models_of_one_engine_step_in_turn_on_one_ledger():
    engine = PrivacyEngine(accountant="rdp")
    data = examples(40)
    _, a, optimizer_a, loader_a = familiar(engine=engine, dataset=data, batch_size=10, noise=1.0)
    _, b, optimizer_b, loader_b = familiar(mlp(), data, engine=engine, batch_size=20, noise=2.0)
    for (x, y), (u, v) in zip(loader_a, loader_b, strict=False):
        F.cross_entropy(a(x), y).backward()
        F.cross_entropy(b(u), v).backward()
        optimizer_b.step()
        optimizer_a.step()
    assert sorted(engine.accountant.history) == [(1.0, 1 / 4, 2), (2.0, 1 / 2, 2)]
    assert (optimizer_a.noise_multiplier, optimizer_b.noise_multiplier) == (1.0, 2.0)
    theirs = opacus.accountants.RDPAccountant()
    theirs.history = engine.accountant.history
    expected = theirs.get_epsilon(DELTA)
    assert expected * 0.9 <= engine.get_epsilon(DELTA) <= expected * 1.001
    engine.detach()
    for model in (a, b):
        model.zero_grad()
    assert leftovers(a, optimizer_a) == leftovers(b, optimizer_b) == []
    assert engine.get_epsilon(DELTA) > 0


def test_a_new_phase_of_one_model_ends_the_one_before():
    engine = PrivacyEngine(accountant="rdp")
    _, model, optimizer, loader = familiar(engine=engine, dataset=examples(40), batch_size=10, noise=1.0)
    train(model, optimizer, loader)
    first = engine.training
    # As scripts do: with what came back, the private loader included.
    _, model, optimizer, again = familiar(model, engine=engine, optimizer=optimizer, noise=2.0)
    made = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=3.0, max_grad_norm=1.0
    )
    train(*made)
    assert made[2] is not loader and len(made[2]) == len(loader) == 4
    assert not first.is_open and engine.training is not first
    assert engine.accountant.history == [(1.0, 1 / 4, 4), (3.0, 1 / 4, 4)]
    for old in (loader, again):
        with pytest.raises(RuntimeError, match="where nothing would be private"):
            next(iter(old))


def with_epsilon(engine, model=None, num=200, **changes):
    model = mlp() if model is None else model
    settings = {"target_epsilon": 3.0, "target_delta": DELTA, "epochs": 2, "max_grad_norm": 1.0} | changes
    return engine.make_private_with_epsilon(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(examples(num), batch_size=20), **settings,
    )  # fmt: skip


def test_guarantee_runs_on_one_ledger_count_each_others_charges():
    """Two runs with budgets, in turn: together they stay within each budget, and stop."""
    engine = PrivacyEngine(accountant="rdp")
    a, b = with_epsilon(engine), with_epsilon(engine, epochs=1)
    assert 10 <= engine.training.steps_left < 13
    done = 0
    with pytest.raises(BudgetExhausted):
        for _ in range(30):
            for model, optimizer, loader in (a, b):
                x, y = next(iter(loader))
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                done += 1
    assert 2.7 < engine.get_epsilon(DELTA) <= 3.0 and 10 < done < 30
    assert engine.training.steps_left == 0
    with pytest.raises(BudgetExhausted):  # nothing is left of such a target, whatever the noise
        with_epsilon(engine, target_epsilon=engine.get_epsilon(DELTA) * 0.999)


def test_a_second_target_is_for_everything_on_the_ledger():
    engine = PrivacyEngine(accountant="rdp")
    model, optimizer, loader = with_epsilon(engine)
    train(model, optimizer, loader)
    alone = engine.noise_multiplier
    model, optimizer, loader = with_epsilon(engine, mlp(), target_epsilon=3.0, epochs=4)
    assert engine.noise_multiplier > alone and engine.training.steps_left >= 40
    for _ in range(4):
        train(model, optimizer, loader)
    assert 2.9 < engine.get_epsilon(DELTA) <= 3.0


def test_a_run_that_continues_a_ledger_keeps_its_noise_where_the_rest_fits(tmp_path):
    noises = []
    for epochs, trained in ((4, 2), (2, 1), (1, 1)):
        engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "ledger")
        model, optimizer, loader = with_epsilon(engine, epochs=epochs)
        for _ in range(trained):
            train(model, optimizer, loader)
        noises.append(engine.noise_multiplier)
        engine.detach()
    assert len(set(noises)) == 1 and 2.95 < engine.training.epsilon(DELTA) <= 3.0
    # More than fits is as before: the noise of a run of its own, ended by the budget.
    with pytest.raises(BudgetExhausted):
        with_epsilon(PrivacyEngine(accountant="rdp", ledger=tmp_path / "ledger"), epochs=4)


@pytest.mark.parametrize("tolerance", [0.5, 0.01, 1e-5])
def test_epsilon_tolerance_bounds_what_the_epochs_leave(tolerance):
    for name in ("rdp", "pld"):
        engine = PrivacyEngine(accountant=name)
        with_epsilon(engine, target_epsilon=8.0, epsilon_tolerance=tolerance, alphas=[2, 3.5])
        steps = 2 * 10
        event = engine.training.sampling.event(engine.training.mechanism.event())
        found = (find_accountant(name).curve(event) * steps).epsilon(DELTA)
        assert 8 - tolerance <= found <= 8
    with pytest.raises(ValueError, match="expected epsilon_tolerance > 0"):
        with_epsilon(PrivacyEngine(), epsilon_tolerance=0.0)
    with pytest.raises(ValueError, match="expected orders alphas > 1"):
        with_epsilon(PrivacyEngine(), alphas=[1.0])


def test_epochs_may_be_a_fraction():
    engine = PrivacyEngine(accountant="rdp")
    with_epsilon(engine, epochs=0.5)
    assert engine.training.steps_left == 5


def loaders():
    data = examples(43)
    plain = DataLoader(data, batch_size=7)
    batches = UniformWithReplacementSampler(num_samples=43, sample_rate=1 / 7)
    return {
        "private": familiar(dataset=data, batch_size=7, noise=1.0)[3],
        "ours": DPDataLoader.from_data_loader(plain),
        "theirs": TheirLoader.from_data_loader(plain),
        "sampler": DataLoader(data, batch_sampler=batches),
    }


@pytest.mark.parametrize("kind", ["private", "ours", "theirs", "sampler"])
def test_a_loader_that_draws_by_poisson_already_is_made_anew_from_its_dataset(kind):
    loader = loaders()[kind]
    model = mlp()
    engine = PrivacyEngine(accountant="rdp")
    assert PrivacyEngine.is_compatible(module=model, data_loader=loader)
    model, optimizer, private = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip
    assert engine.training.sampling.sampling_rate == 1 / 7 and private.dataset is loader.dataset
    train(model, optimizer, private)
    assert engine.training.ledger.num_charges == 7


def test_physical_loaders_and_samplers_of_other_lengths_are_refused():
    engine, _, optimizer, loader = familiar(dataset=examples(40), batch_size=10, noise=1.0)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as small:
        with pytest.raises(ValueError, match="pass the one that it was made of"):
            familiar_with(small)
    part = UniformWithReplacementSampler(num_samples=10, sample_rate=0.5)
    with pytest.raises(ValueError, match="choose the records with"):
        familiar_with(DataLoader(examples(40), batch_sampler=part))
    del engine


def familiar_with(loader):
    model = mlp()
    return PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader,
        noise_multiplier=1.0, max_grad_norm=1.0,
    )  # fmt: skip


def test_a_poisson_loader_before_make_private_is_for_looking():
    loader = DPDataLoader.from_data_loader(DataLoader(examples(40), batch_size=10))
    sizes = [len(x) for x, _ in loader for _ in range(1)]
    assert len(loader) == 4 and loader.sample_rate == 1 / 4 and len(sizes) == 4
    assert all(x.shape[1:] == (4,) for x, _ in DPDataLoader(examples(5), sample_rate=1e-9 + 0.01))
    assert [len(UniformWithReplacementSampler(num_samples=9, sample_rate=1 / n)) for n in (3, 49, 98)] == [
        3,
        49,
        98,
    ]
    for odd in ({"rand_on_empty": True}, {"distributed": True}):
        with pytest.raises(ValueError, match="expected distributed=False and rand_on_empty=False"):
            DPDataLoader.from_data_loader(DataLoader(examples(40), batch_size=10), **odd)
    with pytest.raises(ValueError, match="expected num_samples >= 1"):
        UniformWithReplacementSampler(num_samples=0, sample_rate=0.5)


@pytest.mark.parametrize(("num", "size", "physical"), [(40, 10, 4), (43, 7, 3), (100, 64, 7), (8, 8, 20)])
def test_the_length_under_a_memory_manager_is_that_of_opacus(num, size, physical):
    from opacus.utils.batch_memory_manager import BatchMemoryManager as TheirManager

    data = examples(num)
    found = []
    for library, manager in ((PrivacyEngine, BatchMemoryManager), (opacus.PrivacyEngine, TheirManager)):
        model = mlp()
        _, optimizer, loader = library().make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
            data_loader=DataLoader(data, batch_size=size),
        )  # fmt: skip
        with manager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as small:
            found.append((len(loader), len(small)))
    assert found[0] == found[1] == (math.ceil(num / size), found[0][1])


def test_ghost_mode_returns_the_criterion_as_given():
    data = examples(16)
    for criterion in (nn.CrossEntropyLoss(reduction="sum"), None):
        model = mlp(torch.float64)
        data = examples(8, torch.float64)
        expected = clipped_mean(model, data, expected=1.0)
        reduction = "mean" if criterion is None else "sum"
        engine = PrivacyEngine(accountant="rdp")
        model, optimizer, found, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), criterion=criterion,
            data_loader=DataLoader(data, batch_size=8), noise_multiplier=0.0, max_grad_norm=1.0,
            grad_sample_mode="ghost", loss_reduction=reduction,
        )  # fmt: skip
        assert found is criterion or (criterion is None and found.reduction == "mean")
        for x, y in loader:
            optimizer.zero_grad()
            loss = found(model(x), y)
            loss.backward()
            assert loss.item() > 0
            optimizer.step()
        size = 8 if reduction == "mean" else 1
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad * size, expected[name], rtol=1e-12, atol=1e-12)


def test_without_a_wrapper_a_handle_comes_back_that_ends_the_run():
    model, data = mlp(), examples(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = PrivacyEngine(accountant="rdp")
    hooks, same, loader = engine.make_private(
        module=model, optimizer=optimizer, data_loader=DataLoader(data, batch_size=8), noise_multiplier=1.0,
        max_grad_norm=1.0, wrap_model=False,
    )  # fmt: skip
    assert same is optimizer and hooks is not model
    train(model, optimizer, loader)
    hooks.cleanup()
    hooks.remove_hooks()
    model.zero_grad()
    assert leftovers(model, optimizer) == [] and engine.get_epsilon(DELTA) > 0
    F.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    optimizer.step()  # an ordinary step of an ordinary optimizer
    assert engine.training.ledger.num_charges == 2
    # The last run of an engine gives the ledger back.
    other = PrivacyEngine(accountant="rdp", ledger=engine.training.ledger_path)
    familiar(model, examples(16), engine=other, noise=1.0)


def test_weights_of_a_model_that_opacus_had_wrapped_are_taken():
    wrapped = opacus.GradSampleModule(mlp())
    state = wrapped.state_dict()
    assert all(name.startswith("_module.") for name in state)
    fresh = mlp()
    with torch.no_grad():
        fresh[0].weight.zero_()
    engine, model, optimizer, loader = familiar(fresh, noise=1.0)
    model.load_state_dict(state)
    assert all(torch.equal(p, state[f"_module.{name}"]) for name, p in model.named_parameters())
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\)"):
        model.load_state_dict({**state, "stray": torch.zeros(1)})
    train(model, optimizer, loader)
    engine.detach()
    with pytest.raises(RuntimeError, match="Missing key"):  # an ordinary model again
        model.load_state_dict(state)


def test_a_model_that_is_called_by_that_name_keeps_its_names():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self._module = nn.Linear(4, 3)

        def forward(self, x):
            return self._module(x)

    engine, model, *_ = familiar(Holder(), noise=1.0)
    other = Holder().state_dict()
    model.load_state_dict(other)
    assert torch.equal(model._module.weight, other["_module.weight"])
    engine.detach()


def test_a_failed_second_call_leaves_other_runs_as_they_are(tmp_path):
    engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "ledger")
    _, model, optimizer, loader = familiar(engine=engine, dataset=examples(16), noise=1.0)
    with pytest.raises(ValueError, match="expected a finite clip_norm > 0"):
        familiar(mlp(), engine=engine, max_grad_norm=-1.0)
    with pytest.raises(ValueError, match="epsilon"):
        with_epsilon(engine, mlp(), target_epsilon=-1.0, target_delta=1e-12)
    train(model, optimizer, loader)
    assert engine.training.ledger.num_charges == 2
    fresh = PrivacyEngine(accountant="rdp", ledger=tmp_path / "other")
    with pytest.raises(ValueError, match="expected a finite clip_norm > 0"):
        familiar(mlp(), engine=fresh, max_grad_norm=-1.0)
    assert not (tmp_path / "other").exists()


def test_records_and_dictionaries_of_a_private_loader_keep_their_shape():
    rows = [{"x": x, "y": y} for x, y in examples(12)]
    _, model, optimizer, loader = familiar(dataset=rows, batch_size=6, noise=1.0)
    _, model, optimizer, loader = (None, *familiar_with(loader))
    for batch in loader:
        F.cross_entropy(model(batch["x"]), batch["y"]).backward()
        optimizer.step()
