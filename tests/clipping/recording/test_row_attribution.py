# SPDX-License-Identifier: Apache-2.0
"""Rows that are not the examples: joined as their dense gradients are, and attributed as a loop of autograd would."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipping import (
    Contribution,
    Dense,
    FlatClipper,
    Gathering,
    MixesExamples,
    Outer,
    Routed,
    Rows,
    Tape,
    add,
)
from clipping.gradients.convolved import Convolved, Geometry
from clipping.gradients.joined_rows import BLOCKS, CYCLES, RowMap, joined
from clipping.gradients.path_costs import DEFAULT
from clipping.step.step_sum import StepSum
from tests.clipping.shared_values.test_shared import per_example

F64, D, K = torch.float64, 6, 3
NUM_ROWS, NUM_EXAMPLES = 12, 4


def made(kind):
    real = lambda *shape: torch.randn(NUM_ROWS, *shape, dtype=F64)  # noqa: E731
    outer = Outer(real(2, 3, 2), real(2, 3, 5), torch.Size((4, 5)))
    table = Rows(torch.randint(0, 4, (NUM_ROWS, 3)), real(3, 5), 4)
    geometry = Geometry((3,), (2,), (1,), (1,), 1)
    return {
        "dense": lambda: Dense(real(4, 5)),
        "outer": lambda: outer,
        "rows": lambda: table,
        "routed": lambda: Routed(torch.randint(0, 3, (NUM_ROWS, 4)), real(4, 2), real(4, 5), 3),
        "sum": lambda: add(Outer(real(1, 3, 4), real(1, 3, 5), torch.Size((4, 5))), table),
        "few channels": lambda: Convolved(real(3, 7), real(5, 4), torch.Size((5, 3, 3)), geometry),
        "many channels": lambda: Convolved(real(16, 7), real(5, 4), torch.Size((5, 16, 3)), geometry),
        "repeated": lambda: Convolved(
            torch.randn(2 * NUM_ROWS, 3, 7, dtype=F64), torch.randn(2 * NUM_ROWS, 5, 4, dtype=F64),
            torch.Size((5, 3, 3)), geometry, 2,
        ),
    }[kind]()  # fmt: skip


KINDS = ["dense", "outer", "rows", "routed", "sum", "few channels", "many channels", "repeated"]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS), order=st.sampled_from([BLOCKS, CYCLES, "owners"]), seed=st.integers(0, 999)
)
def test_joined_gradients_are_the_sums_of_the_dense_ones(kind, order, seed):
    torch.manual_seed(seed)
    grads = made(kind)
    rows = RowMap(NUM_EXAMPLES, NUM_ROWS, order)
    if order == "owners":
        owners = torch.randint(-1, NUM_EXAMPLES, (NUM_ROWS,))
        rows = RowMap.of_owners(owners, NUM_EXAMPLES)
        assert torch.equal(rows.owners(owners.device), owners)
        if not rows.num_most:
            return
    found, owners = joined(grads, rows), rows.owners(torch.device("cpu"))
    dense = grads.dense()
    expected = Dense(torch.stack([dense[owners == i].sum(0) for i in range(NUM_EXAMPLES)]))
    weights, direction = torch.rand(NUM_EXAMPLES, dtype=F64), torch.randn(grads.shape, dtype=F64)
    keep, each = torch.rand(NUM_EXAMPLES) > 0.5, torch.randn(NUM_EXAMPLES, *grads.shape, dtype=F64)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # noqa: E731
    close(found.dense(), expected.values)
    close(found.sq_norm(), expected.sq_norm())
    close(found.weighted_sum(weights), expected.weighted_sum(weights))
    close(found.inner(direction), expected.inner(direction))
    close(found.inner(each), expected.inner(each))
    close(found.masked(keep).dense(), expected.masked(keep).values)
    close(found.part(slice(1, 3)).dense(), expected.values[1:3])


# -- whole models -----------------------------------------------------------------------------------------------


def body():
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D))


class Net(nn.Module):
    """`losses` is a function of (model, x)."""

    def __init__(self, losses, **parts):
        super().__init__()
        self.losses = losses
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.losses(self, x)


def blocks(m, x):
    return m.body(x.flatten(0, 1)).view(len(x), K, D).square().mean((1, 2))


def triplets(m, x):
    first, second, third = m.body(torch.cat(x.unbind(1))).chunk(3)
    return F.triplet_margin_loss(first, second, third, margin=5.0, reduction="none")


def images(m, x):
    folded = x.flatten(0, 1).view(-1, 1, 2, 3)
    return m.conv(m.norm(m.first(folded))).flatten(1).view(len(x), -1).square().sum(1)


def frames(m, x):
    states = m.body(x.flatten(0, 1)).view(len(x), K, D)
    return m.recurrent(states)[0].square().sum((1, 2)) + m.recurrent(x.flatten(0, 1).unsqueeze(1))[0].view(
        len(x), -1
    ).sum(1)


def heads(m, x):
    h, task = m.body(x[:, 0]), (x[:, 0, 0] > 0).long()
    out = h.new_zeros(len(x), D)
    for index, head in enumerate(m.heads):
        mine = task == index
        out = out.index_put((mine.nonzero()[:, 0],), head(h[mine]))
    return out.square().sum(1)


def masked(m, x):
    mask = x[..., 0] > 0.2  # as many as the data say
    rows = mask.nonzero()[:, 0]
    found = m.body(m.first(x)[mask]).square().sum(1)
    return torch.zeros(len(x), dtype=x.dtype).index_add(0, rows, found)


def shuffled_rows(m, x):
    order = x[..., 0].flatten().argsort()  # across all examples
    found = m.body(x.flatten(0, 1)[order])
    return found[order.argsort()].view(len(x), -1).square().sum(1)


def one_by_one(m, x):
    return torch.stack([m.body(row).square().sum() for row in x])


def positions_first(m, x):
    return m.body(m.norm(x.transpose(0, 1))).transpose(0, 1).square().sum((1, 2))


def windows(m, x):
    inner = m.body(x.view(len(x), K, 2, 3).flatten(0, 1).flatten(1))
    return m.first(inner.view(len(x), K * D).view(len(x) * K, D)).view(len(x), -1).square().sum(1)


def with_positions(m, x):
    rows = x.flatten(0, 1)
    return (m.body(rows) + m.table(torch.arange(D).fmod(2)).sum(0)).view(len(x), -1).square().sum(1)


CASES = {
    "blocks": lambda: Net(blocks, body=body()),
    "triplets": lambda: Net(triplets, body=body()),
    "images": lambda: Net(images, first=nn.Conv2d(1, 4, 3, padding=1), norm=nn.GroupNorm(2, 4), conv=nn.Conv2d(4, 2, 2)),
    "frames": lambda: Net(frames, body=body(), recurrent=nn.GRU(D, 5, batch_first=True)),
    "heads on selections": lambda: Net(heads, body=body(), heads=nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])),
    "masked positions": lambda: Net(masked, body=body(), first=nn.Linear(D, D)),
    "rows in the order of the data": lambda: Net(shuffled_rows, body=body()),
    "one example after the other": lambda: Net(one_by_one, body=body()),
    "positions before examples": lambda: Net(positions_first, body=body(), norm=nn.LayerNorm(D)),
    "windows": lambda: Net(windows, body=body(), first=nn.Linear(D, 4)),
    "positions beside folded rows": lambda: Net(with_positions, body=body(), table=nn.Embedding(2, D)),
}  # fmt: skip


def batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, K, D, generator=generator, dtype=F64) for size in (5, 3, 1, 4, 2, 6, 3)]


@pytest.mark.parametrize("name", CASES)
def test_guarantee_each_row_is_clipped_with_the_example_that_it_reaches(name):
    torch.manual_seed(0)
    model = CASES[name]().double()
    found = {}
    tape = Tape(model, lambda _: Gathering(lambda grads, _: found.update(grads)))
    expected = [per_example(model, lambda m, x: m(x), x) for x in batches()]
    with tape:
        for x, want in zip(batches(), expected, strict=True):
            found.clear()
            losses = model(x)
            tape.attribute([losses], len(x))
            losses.sum().backward()
            for key, value in want.items():
                got = found[key].dense() if key in found else torch.zeros_like(value)
                torch.testing.assert_close(
                    got, value, rtol=1e-9, atol=1e-9, msg=lambda text, k=key: f"{k}: {text}"
                )


def asked(monkeypatch):
    calls = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    return calls


@pytest.mark.parametrize("name", ["blocks", "triplets", "images", "windows"])
def test_plain_orders_are_asked_for_once_and_again_in_doubt(name, monkeypatch):
    model = CASES[name]().double()
    with Tape(model, lambda _: Gathering(lambda *_: None)) as tape:
        calls = asked(monkeypatch)
        for number, doubt in enumerate((False, False, True, False)):
            if doubt:
                tape.doubt()
            losses = model(batches()[0])
            tape.attribute([losses], 5)
            losses.sum().backward()
            assert len(calls) == (0 if number in (1, 3) else 6), number  # both halves of three cuts
            calls.clear()


@pytest.mark.parametrize("name", ["masked positions", "rows in the order of the data", "heads on selections"])
def test_rows_that_data_pick_are_asked_for_in_every_batch(name, monkeypatch):
    model = CASES[name]().double()
    with Tape(model, lambda _: Gathering(lambda *_: None)) as tape:
        calls = asked(monkeypatch)
        for x in [batches(seed)[0] for seed in range(3)]:
            losses = model(x)
            tape.attribute([losses], 5)
            losses.sum().backward()
            assert len(calls) == 6
            calls.clear()


# -- attacks ----------------------------------------------------------------------------------------------------


def step_of(model):
    return StepSum(model, Contribution(FlatClipper(1e-2)), mean=False, costs=DEFAULT)


def clipped_sum(model, x, step):
    step.begin(len(x))
    step.add(model(x))
    total = torch.cat([v.double().flatten() for v in step.clipped().total.values()])
    step.end()
    return total


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_one_example_moves_the_sum_by_one_clip_norm_whatever_rows_it_takes(name, seed):
    """An example changes how many rows others' heads see, and in which order."""
    torch.manual_seed(seed)
    model = CASES[name]().double()
    x = batches(seed)[0]
    loud = 3 * torch.randn(1, K, D, dtype=F64)
    step = step_of(model)
    with step.tape:
        clipped_sum(model, x, step)  # whatever is learned is learned before
        without = clipped_sum(model, x, step)
        for other in (loud, -loud, 1e3 * loud):
            moved = float((clipped_sum(model, torch.cat([x, other]), step) - without).norm())
            assert moved <= 1e-2 * (1 + 1e-6)


MIXED = {
    "a mean over the rows": lambda m, x: (m.body(x.flatten(0, 1)) - m.body(x.flatten(0, 1)).mean(0)).view(len(x), -1).square().sum(1),
    "a product with assignments that data made": lambda m, x: (
        torch.softmax(x.flatten(1) @ x.flatten(1).T, 1) @ m.body(x.flatten(0, 1)).view(len(x), -1)
    ).square().sum(1),
    "rows of the next example": lambda m, x: m.body(x.flatten(0, 1)).view(len(x), K, D).roll(1, 0).square().mean((1, 2))
    + m.body(x[:, 0]).roll(1, 0).sum(1),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_reach_several_examples_are_refused(name):
    model = Net(MIXED[name], body=body()).double()
    with (
        Tape(model, lambda _: Gathering(lambda *_: None)) as tape,
        pytest.raises(MixesExamples, match="rows of 'body"),
    ):
        losses = model(batches()[0])
        tape.attribute([losses], 5)


def test_an_order_that_turns_out_otherwise_is_asked_for_ever_after(monkeypatch):
    # The same layer sees blocks in one loss and cycles in the next.
    model = Net(lambda m, x: (blocks if m.training else triplets)(m, x), body=body()).double()
    found = {}
    with Tape(model, lambda _: Gathering(lambda grads, _: found.update(grads))) as tape:
        for training in (True, False, True, False):
            model.train(training)
            tape.doubt()
            x = batches()[0]
            want = None
            losses = model(x)
            tape.attribute([losses], 5)
            losses.sum().backward()
            got = found["body.0.weight"].dense()
            tape.detach()
            want = per_example(model, lambda m, x: m(x), x)["body.0.weight"]
            tape.attach()
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_broken_example_does_not_take_the_others_rows():
    model = Net(blocks, body=body()).double()
    x = batches()[0]
    clean = clipped_sum_of(model, x[1:])
    for value in (torch.nan, torch.inf, 1e300):
        broken = x.clone()
        broken[0, 1, 2] = value
        assert torch.isfinite(clipped_sum_of(model, broken)).all()
        torch.testing.assert_close(clipped_sum_of(model, broken), clean, rtol=1e-9, atol=1e-2 * (1 + 1e-6))


def clipped_sum_of(model, x):
    step = step_of(model)
    with step.tape:
        return clipped_sum(model, x, step)
