# SPDX-License-Identifier: Apache-2.0
"""What the familiar door refuses: rather an error than a run that is silently unprotected."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dpopt import MixesExamples, PrivacyEngine, causal_lm_losses
from tests.support.dpopt.private_runs import D, examples, familiar, mlp, train


@pytest.mark.parametrize("method", ["make_private", "make_private_with_epsilon"])
def test_a_misspelt_keyword_is_a_type_error(method):
    with pytest.raises(TypeError, match="noise_multiplierr"):
        getattr(PrivacyEngine(), method)(noise_multiplierr=1.0)
    with pytest.raises(TypeError, match="acountant"):
        PrivacyEngine(acountant="rdp")


def test_peeking_costs_nothing_and_an_older_iterator_is_refused():
    engine, model, optimizer, loader = familiar(dataset=examples(40), batch_size=20, noise=1.0)
    next(iter(loader))
    old = iter(loader)
    next(old)
    assert engine.get_epsilon(1e-5) == 0
    inputs, labels = next(iter(loader))
    F.cross_entropy(model(inputs), labels).backward()
    with pytest.raises(RuntimeError, match="gradients are pending"):
        next(iter(loader))
    optimizer.step()
    with pytest.raises(RuntimeError, match="expected one iterator over the private loader at a time"):
        next(old)


def test_a_drawn_batch_is_not_skipped_but_looking_is_free():
    engine, _, _, loader = familiar(dataset=examples(30), batch_size=5, noise=1.0)
    with torch.no_grad():
        assert sum(1 for _ in loader) == 6
    assert engine.training.sum.num_drawn is None
    batches = iter(loader)
    next(batches)
    with pytest.raises(
        RuntimeError, match=r"expected step\(\) of the private optimizer on every drawn batch"
    ):
        next(batches)


def test_a_backward_outside_a_step_is_refused():
    _, model, optimizer, loader = familiar(noise=1.0)
    model.eval()
    x, y = examples(4).tensors
    with pytest.raises(RuntimeError, match="got one outside a step"):
        F.cross_entropy(model(x), y).backward()
    pixels = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="got one outside a step"):
        model(pixels).sum().backward()
    with pytest.raises(RuntimeError, match=r"take one from batches\(...\) first"):
        optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    model.train()
    train(model, optimizer, loader)


def test_more_examples_than_drawn_or_twice_the_same_are_refused():
    engine, model, optimizer, loader = familiar(noise=1.0)
    for inputs, labels in loader:
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="expected one backward through each forward"):
            loss.backward()
        optimizer.step()
    assert engine.training.ledger.num_charges == 1


@pytest.mark.parametrize(
    "how", ["no backward", "half of the batch", "two halves in one backward", "another model"]
)
def test_a_step_without_the_whole_batch_is_refused(how):
    engine, model, optimizer, loader = familiar(noise=1.0)
    inputs, labels = next(iter(loader))
    if how == "half of the batch":
        F.cross_entropy(model(inputs[:4]), labels[:4]).backward()
    elif how == "two halves in one backward":
        outputs = torch.cat([model(inputs[:4]), model(inputs[4:])])
        F.cross_entropy(outputs, labels).backward()
    elif how == "another model":
        F.cross_entropy(copy.deepcopy(model)(inputs), labels).backward()
    with pytest.raises(RuntimeError, match="for every drawn example before"):
        optimizer.step()
    assert engine.training.ledger.num_charges == 0 and all(p.grad is None for p in model.parameters())
    engine.discard()
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def test_a_second_step_on_the_same_batch_is_refused():
    engine, model, optimizer, loader = familiar(noise=1.0)
    train(model, optimizer, loader)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="expected a batch drawn since the last release"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert engine.training.ledger.num_charges == 1


def test_two_engines_on_one_model_are_refused():
    engine, model, optimizer, loader = familiar(noise=1.0)
    with pytest.raises(RuntimeError, match="expected a model without an open run"):
        familiar(model, noise=1.0)
    train(model, optimizer, loader)
    assert engine.training.ledger.num_charges == 1


def made(model=None, loader=None, optimizer=None, **options):
    model = mlp() if model is None else model
    return PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer,
        data_loader=DataLoader(examples(8), batch_size=4) if loader is None else loader,
        **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options},
    )


@pytest.mark.parametrize(("options", "text"), [
    ({"poisson_sampling": False}, "expected poisson_sampling=True"),
    ({"noise_generator": torch.Generator()}, "whose seed would undo the noise"),
    ({"rand_on_empty": True}, "expected rand_on_empty=False"),
    ({"grad_sample_mode": "fast"}, "expected grad_sample_mode in"),
    ({"grad_sample_mode": "no_op"}, "not known to be one example's each"),
    ({"grad_sample_mode": "ghost_fsdp"}, "sharded models are not supported yet"),
    ({"loss_reduction": "none"}, 'expected loss_reduction "mean" or "sum"'),
    ({"criterion": nn.CrossEntropyLoss(reduction="sum")}, "reduces by the mean, as loss_reduction says"),
    ({"criterion": nn.CrossEntropyLoss(weight=torch.ones(3))}, "a criterion whose mean counts each example once"),
    ({"noise_multiplier": -1.0}, "expected a finite noise_multiplier >= 0"),
    ({"max_grad_norm": 0.0}, "expected a finite clip_norm > 0"),
])  # fmt: skip
def test_switches_that_would_weaken_the_guarantee_are_refused(options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        made(**options)
    assert not (tmp_path / "privacy-ledgers").exists()


def test_unknown_accountants_samplers_and_relations_are_refused():
    with pytest.raises(ValueError, match="expected a sampler out of"):
        PrivacyEngine(sampler="best")
    with pytest.raises(ValueError, match="expected a sampler of records; got 'users'"):
        PrivacyEngine(sampler="users")
    with pytest.raises(ValueError, match="relation must be one of"):
        PrivacyEngine(relation="best")
    with pytest.raises(ValueError, match="accountant must be one of"):
        PrivacyEngine(accountant="best")
    with pytest.raises(
        ValueError, match="the central limit of many steps, which lies below the true epsilon"
    ):
        PrivacyEngine(accountant="gdp")


@pytest.mark.parametrize(
    "kind", ["subset", "weighted", "with replacement", "half", "batch sampler", "no batches"]
)
def test_loaders_that_poisson_sampling_cannot_replace_are_refused(kind):
    data = examples(8)
    sampler = {
        "subset": SubsetRandomSampler(range(4)),
        "weighted": WeightedRandomSampler([1.0] * 8, 8),
        "with replacement": RandomSampler(data, replacement=True),
        "half": RandomSampler(data, num_samples=4),
    }.get(kind)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    if kind == "batch sampler":
        loader = DataLoader(data, batch_sampler=[[0, 1], [2, 3]])
    elif kind == "no batches":
        loader = DataLoader(data, batch_size=None)
    with pytest.raises(ValueError, match="choose the records with"):
        made(loader=loader)


def test_loaders_without_a_rate_are_refused():
    for loader in (
        DataLoader(examples(8), batch_size=9, drop_last=True),
        DataLoader(examples(0), batch_size=2),
    ):
        with pytest.raises(ValueError, match="a data loader of length 0"):
            made(loader=loader)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(examples(8))

    with pytest.raises(ValueError, match="load the records into a map-style dataset"):
        made(loader=DataLoader(Stream(), batch_size=2))


def test_the_rate_follows_the_length_of_the_loader_as_in_opacus():
    for num, size, drop_last, rate, expected in ((100, 64, False, 1 / 2, 50), (130, 64, True, 1 / 2, 65),
                                                 (49, 1, False, 1 / 49, 1), (98, 2, False, 1 / 49, 2)):  # fmt: skip
        engine = PrivacyEngine(accountant="rdp")
        model = mlp()
        engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0,
            data_loader=DataLoader(examples(num), batch_size=size, drop_last=drop_last), max_grad_norm=1.0,
        )  # fmt: skip
        sampling = engine.training.sampling
        assert sampling.sampling_rate == rate
        assert sampling.expected_batch_size == max(1, int(num * (1 / round(1 / rate)))) and expected


def test_foreign_parameters_are_refused_now_and_later():
    model, head = mlp(), nn.Linear(3, 3)
    both = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="got 2 parameters of something else"):
        made(model, optimizer=both)
    engine, model, optimizer, loader = familiar(noise=1.0)
    optimizer.add_param_group({"params": list(head.parameters())})
    before = head.weight.clone()
    inputs, labels = next(iter(loader))
    F.cross_entropy(head(model(inputs)), labels).backward()
    with pytest.raises(ValueError, match="which would be trained without noise"):
        optimizer.step()
    assert torch.equal(head.weight, before) and engine.training.ledger.num_charges == 0


class TokenModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embedding(input_ids))
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_token_labels_are_refused():
    tokens = torch.randint(0, 10, (8, 5))
    _, model, optimizer, loader = familiar(TokenModel(), TensorDataset(tokens), noise=1.0)
    for (batch,) in loader:
        with pytest.raises(ValueError, match=r"dpopt.causal_lm_losses\(logits, labels\).mean\(\)"):
            model(batch, labels=batch)
        with torch.no_grad():
            model(batch, labels=batch)
        causal_lm_losses(model(batch), batch).mean().backward()
        optimizer.step()


class Mixing(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.head, self.where = nn.Linear(D, 3), where

    def forward(self, x, scale=1):
        x = x - x.mean(0) if self.where == "inputs" else x
        y = self.head(x)
        return y + y.cumsum(0) if self.where == "outputs" else y


@pytest.mark.parametrize("where", ["inputs", "outputs"])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_model_that_mixes_examples_is_refused_at_its_first_batch(where, keyword):
    """However the loop feeds the model: dictionaries, keywords, several inputs."""
    rows = [{"x": x, "y": y} for x, y in examples(8)]
    engine, model, _, loader = familiar(Mixing(where), rows, noise=1.0)
    batch = next(iter(loader))
    with pytest.raises(MixesExamples, match="to depend on that example alone"):
        model(x=batch["x"]) if keyword else model(batch["x"], 2)
    assert engine.training.sum.num_added == 0 and model.head.weight.grad is None


def test_a_sound_model_is_probed_once_and_may_change_its_inputs_in_place():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(D, 3)

        def forward(self, x):
            return self.head(x.mul_(2))

    engine, model, optimizer, loader = familiar(InPlace(), noise=1.0)
    train(model, optimizer, loader)
    assert engine.training.sum.probing.done and not engine.training.sum.probing.watched
