# SPDX-License-Identifier: Apache-2.0
"""Draws that hold nobody: a row stands in, goes through every check, and adds exactly nothing."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, default_collate

from dpopt import BatchMemoryManager, PrivacyEngine
from dpopt.budget.payments import Draw
from dpopt.estimators import ESTIMATORS
from tests.support.dpopt.private_runs import D, familiar, mlp

ONE_DRAW = ([3, 1], [], [2], [], [], [1, 2, 3, 4])
NAMES = [name for name in ESTIMATORS if not name.startswith(("per_block", "per_adapter"))]
NUMBERS = {"schedule": "schedule:steps=6"}


class Vectors(Dataset):
    """Six records; the first, which nobody draws below, is `first`."""

    def __init__(self, first=1.0):
        generator = torch.Generator().manual_seed(2)
        self.inputs = torch.randn(6, D, generator=generator)
        self.inputs[0] = first

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return index, self.inputs[index], index % 3


def drawing(engine, draws):
    """Make `engine` draw `draws`, over and over."""
    training, honest = engine.training, engine.training.draw

    def draw(num_records):
        number = honest(num_records).number
        return Draw(list(draws[number % len(draws)]), number)

    training.draw = draw


def losses_of(model, inputs, labels):
    return F.cross_entropy(model(inputs), labels, reduction="none")


def backward(engine, model, batch, how):
    records, inputs, labels = batch
    losses = partial(losses_of, model, inputs, labels)
    if how == "evaluate":
        engine.evaluate(losses, records=records.tolist())
    elif how == "same_examples":
        with engine.same_examples():
            losses().mean().backward()
            losses().square().mean().backward()
    else:
        losses().mean().backward()


def trajectory(first, clipping="flat", how="backward", largest=None, noise=1.0):
    """(steps, parameters): the released gradient of each step."""
    engine, model, optimizer, loader = familiar(
        mlp(), Vectors(first), batch_size=1, noise=noise, clipping=NUMBERS.get(clipping, clipping),
        max_grad_norm=0.1, engine=PrivacyEngine(accountant="rdp", insecure_seed=3),
    )  # fmt: skip
    drawing(engine, ONE_DRAW)
    found = []
    manager = BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=largest or 9, optimizer=optimizer
    )
    with manager as small:
        for batch in small:
            assert len(batch[0]) > 0
            backward(engine, model, batch, how)
            optimizer.step()
            if not engine.training.sum.num_added:
                found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    engine.detach()
    return torch.stack(found)


@pytest.mark.parametrize("first", [float("nan"), 1e30, 0.0], ids=str)
@pytest.mark.parametrize("clipping", NAMES)
def test_guarantee_the_row_of_an_empty_draw_adds_nothing(clipping, first):
    """Every estimator, and its state of later steps: what is released is the same bit by bit, whatever stands in."""
    how = "evaluate" if clipping in ("clip21", "diff2") else "backward"
    expected = trajectory(1.0, clipping, how)
    assert len(expected) == 6 and expected.isfinite().all()
    assert torch.equal(trajectory(first, clipping, how), expected)


@pytest.mark.parametrize("largest", [1, 2, 3])
@pytest.mark.parametrize("how", ["backward", "same_examples", "evaluate"])
def test_the_row_of_an_empty_draw_adds_nothing_in_parts_and_blocks(how, largest):
    expected = trajectory(1.0, how=how, largest=largest)
    assert torch.equal(trajectory(float("nan"), how=how, largest=largest), expected)


def test_an_empty_draw_is_a_step_of_noise():
    found = trajectory(1.0, noise=0.0)
    empty = [not draw for draw in ONE_DRAW]
    assert [bool((row == 0).all()) for row in found] == empty
    assert trajectory(1.0).ne(0).all()


def test_whether_a_step_is_accepted_does_not_depend_on_the_draw():
    """A step without its backward, or with two: refused where nobody was drawn as where somebody was."""
    for draws in ([[]], [[2]]):
        engine, model, optimizer, loader = familiar(mlp(), Vectors(), batch_size=1)
        drawing(engine, draws)
        _, inputs, labels = next(iter(loader))
        with pytest.raises(RuntimeError, match="for every drawn example before"):
            optimizer.step()
        losses_of(model, inputs, labels).mean().backward()
        with pytest.raises(RuntimeError, match="expected each drawn example once"):
            losses_of(model, inputs, labels).mean().backward()
        engine.discard()
        losses_of(model, inputs, labels).mean().backward()
        optimizer.step()
        engine.detach()


class Odd:
    """A batch of a class of its own, as from a tokenizer or a graph library."""

    def __init__(self, rows):
        self.names = [f"record {i}" for i, _, _ in rows]
        self.arrays = {"x": torch.stack([x for _, x, _ in rows]).numpy()}
        self.labels = [label for *_, label in rows]


class Ragged(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(D, 3)

    def forward(self, sequences):
        return self.layer(torch.stack([x.mean(0) for x in sequences]))


def ragged(rows):
    return [x.expand(1 + i % 3, D) for i, x, _ in rows], torch.tensor([y for *_, y in rows])


def time_first(rows):
    x, y = ragged(rows)
    return torch.nn.utils.rnn.pad_sequence(x), [len(s) for s in x], y


def positions(model, inputs):
    return model(inputs.view(len(inputs), -1))


@pytest.mark.parametrize(("collate", "model", "outputs"), [
    (Odd, mlp, lambda m, b: (m(torch.from_numpy(b.arrays["x"])), torch.tensor(b.labels))),
    (ragged, Ragged, lambda m, b: (m(b[0]), b[1])),
    (time_first, mlp, lambda m, b: (m(b[0].sum(0) / torch.tensor(b[1]).unsqueeze(1)), b[2])),
    (default_collate, mlp, lambda m, b: (positions(m, b[1]), b[2])),
    (lambda rows: {"x": [x.tolist() for _, x, _ in rows], "y": [y for *_, y in rows], "n": len(rows), "no": None},
     mlp, lambda m, b: (m(torch.tensor(b["x"])), torch.tensor(b["y"]))),
], ids=["class", "ragged", "time first", "view", "lists"])  # fmt: skip
def test_collate_functions_and_models_need_not_know_empty_batches(collate, model, outputs):
    engine, model, optimizer, loader = familiar(
        model(), Vectors(), batch_size=1, noise=1.0, collate_fn=collate
    )
    drawing(engine, ([], [1, 2], [], [3], [2, 4, 5], [1, 5]))
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            F.cross_entropy(*outputs(model, batch)).backward()
            optimizer.step()
    assert engine.training.ledger.num_charges == 12
    engine.detach()
