# SPDX-License-Identifier: Apache-2.0
"""What a loop puts into its losses as constants: gradients it took itself, counts, tensors of earlier batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpopt import MixesExamples
from tests.support.dpopt.private_runs import examples, familiar, mlp

NUM = 8


def run(losses, door, draws=2):
    """A run whose losses (B,) are those of `losses(model, x, y)`; in the familiar door, their mean."""
    engine, model, optimizer, loader = familiar(mlp(), examples(NUM), batch_size=NUM)
    try:
        for _ in range(draws):
            for x, y in loader:
                optimizer.zero_grad()
                found = losses(model, x, y)
                engine.backward(found) if door == "losses" else found.mean().backward()
                optimizer.step()
    finally:
        engine.detach()
    return engine


# -- gradients ----------------------------------------------------------------------------------------------------


def _normed(model, x, y):
    z = model(x)
    (grad,) = torch.autograd.grad(F.cross_entropy(z, y), z, retain_graph=True)
    return (z * (grad / grad.norm())).sum(1)


def _detached(model, x, y):
    z = model(x)
    leaf = z.detach().requires_grad_()
    F.cross_entropy(leaf, y).backward()
    assert leaf.grad is not None
    return (z * (leaf.grad / leaf.grad.norm())).sum(1)


def _of_mixed(model, x, y):
    z = model(x)
    leaf = z.detach().requires_grad_()
    F.cross_entropy(leaf / leaf.norm(), y).backward()
    return (z * leaf.grad).sum(1)


def _over_the_batch(model, x, y):
    z = model(x)
    leaf = z.detach().requires_grad_()
    (grad,) = torch.autograd.grad(leaf.softmax(0).pow(2).sum(), leaf)
    return (z * grad).sum(1)


def _each_by_itself(model, x, y):
    z = model(x)
    leaf = z.detach().requires_grad_()
    F.cross_entropy(leaf, y).backward()
    assert leaf.grad is not None
    return (z * F.normalize(leaf.grad, dim=1)).sum(1)


@pytest.mark.parametrize("door", ["familiar", "losses"])
@pytest.mark.parametrize("losses", [_normed, _detached, _of_mixed, _over_the_batch])
def test_attack_by_a_gradient_that_the_loop_took_is_refused(losses, door):
    with pytest.raises(MixesExamples):
        run(losses, door, draws=1)


@pytest.mark.parametrize("door", ["familiar", "losses"])
def test_gradients_of_each_example_by_itself_are_taken(door):
    run(_each_by_itself, door)


# -- counts -------------------------------------------------------------------------------------------------------


COUNTS = {
    "the size of what is not zero": lambda chosen, x: chosen.nonzero().shape[0],
    "the length of a selection": lambda chosen, x: len(x[chosen]),
    "a sum": lambda chosen, x: int(chosen.sum()),
}


@pytest.mark.parametrize("door", ["familiar", "losses"])
@pytest.mark.parametrize("name", COUNTS)
def test_attack_by_a_count_is_refused_where_it_changes(name, door):
    calls = []

    def losses(model, x, y):
        calls.append(1)
        chosen = torch.arange(NUM) < NUM - len(calls)  # a selection that shrinks
        return F.cross_entropy(model(x), y, reduction="none") / COUNTS[name](chosen & (x[:, 0] == x[:, 0]), x)

    with pytest.raises(MixesExamples):
        run(losses, door, draws=5)


@pytest.mark.parametrize("number", [lambda k: 2.0, lambda k: k + 1.5, lambda k: 1 + k % 2])
def test_public_numbers_beside_counts_are_taken(number):
    calls = []

    def losses(model, x, y):
        calls.append(1)
        _ = (torch.arange(NUM) + x[:, 0] * 0 < 1 + len(calls) % 2).nonzero().shape[0]
        return F.cross_entropy(model(x), y, reduction="none") / number(len(calls))

    run(losses, "losses", draws=9)


# -- earlier batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["familiar", "losses"])
@pytest.mark.parametrize("since", [2, 3, 4, 6])
def test_attack_by_an_earlier_batch_in_the_place_of_the_drawn_one_is_refused(since, door):
    kept: list[tuple[Tensor, Tensor]] = []

    def losses(model, x, y):
        kept.append((x, y))
        a, b = kept[since - 2] if len(kept) >= since else (x, y)
        return F.cross_entropy(model(a), b, reduction="none")

    with pytest.raises(MixesExamples, match="earlier batch"):
        run(losses, door, draws=since)


def test_an_earlier_batch_that_is_only_looked_at_and_a_tensor_that_is_handed_out_again_are_taken():
    data = [
        (torch.randn(4, generator=torch.Generator().manual_seed(i)), torch.tensor(i % 3)) for i in range(NUM)
    ]
    whole = torch.stack([x for x, _ in data]), torch.stack([y for _, y in data])
    engine, model, optimizer, loader = familiar(mlp(), data, batch_size=NUM, collate_fn=lambda rows: whole)
    earlier = []
    for _ in range(5):
        for x, y in loader:
            with torch.no_grad():
                _ = [model(a) for a in earlier]
            earlier.append(x.clone())
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    engine.detach()
