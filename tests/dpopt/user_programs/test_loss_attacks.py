# SPDX-License-Identifier: Apache-2.0
"""Attacks on the checks of scalar losses: each let one record move the clipped sum by more than the clip norm."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpopt import MixesExamples
from tests.support.dpopt.private_runs import examples, familiar

NUM = 6


class Sigmoid(torch.autograd.Function):
    """A function of the loop's own, under the name of one of torch's."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm()


def _written(values, write):
    weights = torch.ones(len(values))
    write(weights, values.detach())
    return (values * weights).mean()


def _counted(values, labels):
    counts = torch.zeros(3).index_add_(0, labels, torch.ones(len(labels)))
    return (values / counts[labels]).mean()


def _chosen(weights, values):
    weights[values.argsort()[-2:]] = 3.0


def _scattered(values, labels):
    return torch.zeros(NUM).scatter_add(0, labels, values).pow(2).mean()


def _without_gradients(model, x, y):
    with torch.no_grad():
        weights = F.cross_entropy(model(x), y, reduction="none")
    return (F.cross_entropy(model(x), y, reduction="none") * (weights / weights.sum() * len(x))).mean()


def _of_own(loss):
    return lambda model, x, y: loss(F.cross_entropy(model(x), y, reduction="none"), y)


LOSSES = {
    "a function of the loop's own under a known name": lambda m, x, y: F.cross_entropy(Sigmoid.apply(m(x)), y),
    "scatter_add into a constant": _of_own(_scattered),
    "weights by a forward without gradients": _without_gradients,
    "a sum written over a whole tensor": _of_own(lambda v, y: _written(v, lambda w, d: w.fill_(d.sum()))),
    "a sum assigned to a slice": _of_own(lambda v, y: _written(v, lambda w, d: w[:].copy_(d.sum()))),
    "a sum filled in by an index": _of_own(
        lambda v, y: _written(v, lambda w, d: w.index_fill_(0, torch.arange(len(d)), d.sum()))
    ),
    "weights assigned to the largest losses": _of_own(lambda v, y: _written(v, _chosen)),
    "a sum in addcdiv": _of_own(
        lambda v, y: torch.addcdiv(torch.zeros(len(v)), v, v.detach().sum()).mean()
    ),
    "counts of classes by index_add_": _of_own(_counted),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_attack_by_a_coupled_loss_is_refused(name):
    engine, model, optimizer, loader = familiar(dataset=examples(NUM), batch_size=NUM)
    x, y = next(iter(loader))
    optimizer.zero_grad()
    with pytest.raises(MixesExamples):
        LOSSES[name](model, x, y).backward()
    engine.detach()


def test_attack_by_a_gradient_made_of_the_loss_is_refused():
    engine, model, _, loader = familiar(dataset=examples(NUM), batch_size=NUM)
    x, y = next(iter(loader))
    loss = F.cross_entropy(model(x), y)
    with pytest.raises(MixesExamples):
        loss.backward(gradient=loss.detach())
    engine.detach()


def test_attack_by_means_over_the_examples_of_each_class_is_refused():
    engine, model, _, loader = familiar(dataset=examples(NUM), batch_size=NUM, loss_reduction="sum")
    x, y = next(iter(loader))
    losses = F.cross_entropy(model(x), y, reduction="none")
    with pytest.raises(MixesExamples):
        (
            torch.stack([losses[i] for i in range(4)]).mean() + torch.stack([losses[4], losses[5]]).mean()
        ).backward()
    engine.detach()


def test_attack_by_numbers_of_an_earlier_batch_is_refused():
    engine, model, optimizer, loader = familiar(nn.Linear(4, 3), examples(NUM), batch_size=NUM)
    centre = torch.zeros(3)
    with pytest.raises(MixesExamples, match="earlier batch"):
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                outputs = model(x)
                F.cross_entropy(outputs - centre, y).backward()
                centre = centre + outputs.detach().mean(0)
                optimizer.step()
    engine.detach()


def _copied(x):
    x = x.clone()
    x[:] = x[0]
    return x


@pytest.mark.parametrize(
    "inputs", [lambda x: (_copied(x),), lambda x: (x, x[0])], ids=["rows", "beside the rows"]
)
def test_attack_by_one_example_in_the_place_of_all_is_refused(inputs):
    class Taking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x, other=None):
            return self.inner(x if other is None else x + other)

    engine, model, _, loader = familiar(Taking(), examples(NUM), batch_size=NUM)
    x, _ = next(iter(loader))
    with pytest.raises(MixesExamples, match="single example"):
        model(*inputs(x))
    engine.detach()
