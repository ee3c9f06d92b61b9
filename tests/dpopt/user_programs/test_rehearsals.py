# SPDX-License-Identifier: Apache-2.0
"""A model's forward is rehearsed with other examples: what brings them together is refused, what does not is taken."""

import random
from collections import UserDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from dpopt import MixesExamples
from tests.support.dpopt.private_runs import D, K, examples, explicit, familiar, losses_of

NUM = 8


class Model(nn.Module):
    """Two layers and what `forward` makes of them."""

    def __init__(self, forward):
        super().__init__()
        self.inner, self.outer, self.run = nn.Linear(D, 6), nn.Linear(6, K), forward
        self.register_buffer("held", torch.zeros(6), persistent=False)
        self.calls, self.notes = 0, {"largest": [0.0]}

    def forward(self, x, *others, **more):
        return self.run(self, x, *others, **more)


def both_doors(forward, draws=2, **options):
    """Nothing where the two doors take the model for so many draws; else what both of them raised."""
    raised = []
    for door in (_familiar, _explicit):
        try:
            door(Model(forward), draws, **options)
        except (MixesExamples, RuntimeError) as refusal:
            raised.append(refusal)
    assert len(raised) in (0, 2)
    return [str(x) for x in raised]


def _familiar(model, draws, call=lambda model, x: model(x)):
    engine, model, optimizer, loader = familiar(model, examples(NUM), batch_size=NUM)
    try:
        for _ in range(draws):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(call(model, x), y).backward()
                optimizer.step()
    finally:
        engine.detach()


def _explicit(model, draws, call=lambda model, x: model(x)):
    with explicit(model, noise=1.0) as private:
        for batch in private.batches(examples(NUM), steps=draws):
            private.accumulate(losses_of(lambda x: call(model, x), batch.examples))
            private.release()


# -- statistics of the batch --------------------------------------------------------------------------------------


class Normalising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return grad / grad.norm()


class Averaging(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1.0

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].abs().max()


def _largest(model, x):
    with torch.no_grad():
        largest = x.abs().max()
    return model.outer(torch.tanh(model.inner(x / largest)))


def _branch(model, x):
    h = torch.tanh(model.inner(x))
    return model.outer(h * 30 if x.abs().max() > 50 else h)


def _best(model, x):
    h = model.inner(x)
    chosen = torch.zeros(len(h), 1)
    chosen[h.detach().norm(dim=1).topk(2).indices] = 1.0
    return model.outer(h * chosen)


def _slope(model, x):
    h = model.inner(x)
    return model.outer(h.detach() + h.detach().norm() * (h - h.detach()))


def _hooked(model, x):
    h = model.inner(x)
    if h.requires_grad:
        h.register_hook(lambda grad: grad / grad.norm())
    return model.outer(h)


def _selected(model, x):
    return model.outer(model.inner(x) / (1 + (x.amax(1) > 2).nonzero().shape[0]))


def _numpy(model, x):
    return model.outer(model.inner(x) / float(np.abs(x.detach().numpy()).max()))


STATISTICS = {
    "the largest value": _largest,
    "a branch on the largest value": _branch,
    "a norm": lambda m, x: m.outer((h := m.inner(x)) / h.detach().norm()),
    "a mean": lambda m, x: m.outer((h := m.inner(x)) - h.detach().mean(0)),
    "the largest rows": _best,
    "the slope alone": _slope,
    "a hook": _hooked,
    "the size of a selection": _selected,
    "numpy": _numpy,
    "a function that normalises gradients": lambda m, x: m.outer(Normalising.apply(m.inner(x))),
    "a function that saves a statistic": lambda m, x: m.outer(Averaging.apply(m.inner(x))),
    "on the outputs": lambda m, x: (h := m.outer(m.inner(x))) / h.detach().abs().max(),
    "ranks": lambda m, x: m.outer(m.inner(x) * x[:, :1].argsort(0).argsort(0)),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_attack_by_a_statistic_of_the_batch_without_a_gradient_is_refused(name):
    assert all("beside it were replaced" in x for x in both_doors(STATISTICS[name]) or [""])


def test_attack_by_a_statistic_of_tokens_is_refused():
    class Tokens(nn.Module):
        def __init__(self, mixing):
            super().__init__()
            self.table, self.head, self.mixing = nn.Embedding(9, D), nn.Linear(D, K), mixing

        def forward(self, ids):
            h = self.table(ids)
            return self.head(h / h.detach().abs().max() if self.mixing else h).mean(1)

    ids = torch.randint(0, 9, (NUM, 5), generator=torch.Generator().manual_seed(0))
    ids[1:] = ids[0]  # all alike: only the scale of the embeddings tells
    for mixing in (True, False):
        engine, model, _, loader = familiar(
            Tokens(mixing), TensorDataset(ids, torch.zeros(NUM).long()), batch_size=NUM
        )
        x, _ = next(iter(loader))
        if mixing:
            with pytest.raises(MixesExamples):
                model(x)
        else:
            model(x)
        engine.detach()


@pytest.mark.parametrize("since", [3, 6, 7])
def test_attack_that_begins_at_a_later_draw_is_refused_where_the_graph_grows(since):
    def forward(model, x):
        model.calls += 1
        h = model.inner(x)
        return model.outer(h / h.detach().norm() if model.calls >= since else h)

    found = both_doors(forward, draws=10)
    assert all("beside it were replaced" in x for x in found or [""])


@pytest.mark.parametrize(
    "there", [lambda h: h.flip(0), lambda h: h[torch.arange(len(h)) - 1]], ids=["flipped", "rolled"]
)
def test_attack_by_rows_in_another_order_there_and_back_from_a_later_draw_on_is_refused(there):
    def forward(model, x):
        model.calls += 1
        h = model.inner(x)
        if model.calls < 6:
            return model.outer(h)
        out = model.outer(there(h))
        order = there(torch.arange(len(h)))
        return out[order.argsort()]

    found = both_doors(forward, draws=7)
    assert len(found) == 2 and all("depend on that example alone" in x for x in found)


def test_a_batch_of_one_row_leaves_the_rehearsal_to_the_next():
    for sizes in ([1, 1, 1, 5], [1, 2]):
        with explicit(Model(_largest), noise=1.0) as private:
            for number, size in enumerate(sizes):
                private.begin(private.draw(NUM).number, size)
                batch = [examples(NUM)[i] for i in range(size)]
                if number < len(sizes) - 1:
                    private.accumulate(losses_of(private.model, batch))
                    private.release()
                else:
                    with pytest.raises(MixesExamples):
                        private.accumulate(losses_of(private.model, batch))


# -- from batch to batch ------------------------------------------------------------------------------------------


def _average(model, x):
    h = model.inner(x)
    model.average = 0.9 * getattr(model, "average", 0.0) + 0.1 * h.detach().mean(0)
    return model.outer(h - model.average)


def _centred(model, x):
    h = model.inner(x)
    out = model.outer(h - model.held)
    with torch.no_grad():
        model.held += 0.001 * h.mean(0)
    return out


def _rebound(model, x):
    h = model.inner(x)
    out = model.outer(h - model.held)
    model.held = h.detach().mean(0)
    return out


def _noted(model, x):
    h, largest = model.inner(x), model.notes["largest"][0]
    model.notes["largest"][0] = float(h.detach().abs().max())
    return model.outer(h - largest)


def _queue(model, x):
    h = model.inner(x)
    bank = model.notes.setdefault("bank", [])
    out = h + bank[-1] if bank else h
    bank.append(h.detach()[0])
    return model.outer(out)


class Running:
    def __init__(self):
        self.mean = torch.zeros(6)


def _object(model, x):
    h = model.inner(x)
    running = model.__dict__.setdefault("running", Running())
    out = model.outer(h - running.mean)
    running.mean = running.mean * 0.9 + 0.1 * h.detach().mean(0)
    return out


EVERYWHERE = {"largest": 0.0}


def _global(model, x):
    h, largest = model.inner(x), EVERYWHERE["largest"]
    EVERYWHERE["largest"] = float(h.detach().abs().max())
    return model.outer(h - largest)


KEPT = {
    "in an attribute": _average,
    "in a buffer in place": _centred,
    "in a buffer anew": _rebound,
    "in a list in a dict": _noted,
    "in a queue": _queue,
    "in an object": _object,
    "in a global": _global,
}


@pytest.mark.parametrize("name", KEPT)
def test_attack_by_what_is_kept_from_batch_to_batch_is_refused(name):
    found = both_doors(KEPT[name])
    assert len(found) == 2 and all("kept of its examples" in x or "runs again from the same state" in x or "beside it were" in x for x in found)  # fmt: skip


def test_what_is_kept_is_named():
    assert all("'held'" in x for x in both_doors(_rebound) or [""])


def test_a_rehearsal_leaves_everything_as_it_was():
    seen = []

    def forward(model, x):
        model.calls += 1
        model.notes["largest"].append(model.calls)
        model.drawn = torch.rand(2), random.random(), np.random.rand()
        x += 0.0
        seen.append((model.calls, len(model.notes["largest"]), model.drawn[0], *model.drawn[1:]))
        model.last = x.detach().clone()
        return model.outer(F.dropout(torch.relu_(model.inner(x)), 0.5))

    drawn = []
    for _ in range(2):
        seen.clear()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Model(forward)
        with explicit(model, noise=0.0, insecure_seed=1) as private:
            for batch in private.batches(examples(NUM), steps=1):
                torch.manual_seed(5)
                losses = losses_of(model, batch.examples)
                private.accumulate(losses)
                private.release()
        assert model.calls == 1 and model.notes["largest"] == [0.0, 1]
        drawn.append((seen[-1][2:], losses.detach(), [p.grad for p in model.parameters()]))
    plain = Model(forward)
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    expected = losses_of(plain, [examples(NUM)[i] for i in range(NUM)])
    torch.testing.assert_close(drawn[-1][1], expected.detach())


# -- look-alikes --------------------------------------------------------------------------------------------------


def _counting(model, x):
    model.calls += 1
    model.last = model.inner(x)
    model.notes["largest"].append(float(model.last.detach().max()))
    return model.outer(model.last * (1 + model.calls))


def _cached(model, x):
    if model.held.numel() < x.shape[1]:
        model.held = torch.arange(float(x.shape[1]))
    return model.outer(model.inner(x + model.held[: x.shape[1]]))


def _spots(model, x):
    """Draws as many numbers for a row as the row decides."""
    x = x.clone()
    for i in range(len(x)):
        for _ in range(int(x[i].abs().sum()) % 3):
            x[i, np.random.randint(D)] = 0.0
    return model.outer(model.inner(x))


def _trimmed(model, x):
    """Leaves out what no example uses."""
    h = F.relu(model.inner(x))
    used = int((h > 0).any(0).nonzero().max()) + 1
    return model.outer(F.pad(h[:, :used], (0, 6 - used)))


def _checked(model, x):
    assert x.abs().max() < 100, "inputs out of range"
    return model.outer(model.inner(x))


ALIKE = {
    "dropout": lambda m, x: m.outer(F.dropout(torch.tanh(m.inner(x)), 0.5)),
    "numbers of numpy and Python": lambda m, x: m.outer(m.inner(x + np.random.rand() + random.random())),
    "a count of calls and what is kept for show": _counting,
    "a cache by length": _cached,
    "draws that a row decides": _spots,
    "cut to the longest": _trimmed,
    "a check of the range": _checked,
    "in place": lambda m, x: m.outer(F.relu(m.inner(x), inplace=True)),
    "its own norm": lambda m, x: m.outer((h := m.inner(x)) / h.detach().norm(dim=1, keepdim=True)),
    "a checkpoint": lambda m, x: m.outer(
        checkpoint(lambda h: torch.tanh(m.inner(h)).exp(), x, use_reentrant=False)
    ),
    "folded": lambda m, x: m.outer(m.inner(x.repeat_interleave(3, 0)).view(len(x), 3, 6).mean(1)),
    "tiled": lambda m, x: m.outer(m.inner(x.repeat(3, 1)).view(3, len(x), 6).mean(0)),
    "turned": lambda m, x: m.outer(m.inner(x.repeat(2, 1).flip(0)).flip(0).view(2, len(x), 6).mean(0)),
    "a public constant": lambda m, x: m.outer(m.inner(x) / 7.0),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_keeps_examples_apart_is_taken(name):
    assert both_doors(ALIKE[name], draws=5) == []


def _shared(model, x, table):
    """`table` has as many rows as there are examples, by chance."""
    return model.outer(model.inner(x)) + (x @ table.T).sum(1, keepdim=True)


def _by_name(model, x, *, table):
    return {"scores": _shared(model, x, table), "show": (table.sum(1), x.mean()), "all": [x.mean(0)]}


@pytest.mark.parametrize("rows", [NUM, NUM + 1])
def test_a_table_of_as_many_rows_as_examples_is_taken(rows):
    table = torch.randn(rows, D, generator=torch.Generator().manual_seed(3))
    assert both_doors(_shared, call=lambda m, x: m(x, table)) == []
    assert both_doors(_by_name, call=lambda m, x: m(x, table=table)["scores"]) == []


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False, dropout=0.1)
        self.first, self.last = nn.Linear(D, 8), nn.Linear(8, K)

    def forward(self, x, mask):
        h = self.first(x).transpose(0, 1)  # (T, B, 8)
        return self.last(self.attend(h, src_mask=mask).mean(0))


@pytest.mark.parametrize("length", [NUM, NUM - 1])
def test_a_mask_for_all_and_sequences_as_long_as_the_batch_is_wide_are_taken(length):
    x = torch.randn(NUM, length, D, generator=torch.Generator().manual_seed(4))
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    engine, model, optimizer, loader = familiar(
        Sequences(), TensorDataset(x, torch.arange(NUM) % K), batch_size=NUM
    )
    for a, y in loader:
        F.cross_entropy(model(a, mask), y).backward()
        optimizer.step()
    engine.detach()


class Positions(nn.Module):
    def __init__(self, expand):
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(11, 6), nn.Embedding(NUM + 1, 6), nn.Linear(6, K)
        self.expand = expand

    def forward(self, ids):
        places = torch.arange(ids.shape[1])
        return self.head(self.tokens(ids) + self.places(places[None] if self.expand else places)).mean(1)


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("length", [NUM, NUM - 1])
def test_positions_for_all_of_sequences_as_long_as_the_batch_is_wide_are_taken(length, expand):
    ids = torch.randint(0, 11, (NUM, length), generator=torch.Generator().manual_seed(5))
    engine, model, optimizer, loader = familiar(
        Positions(expand), TensorDataset(ids, torch.arange(NUM) % K), batch_size=NUM
    )
    for a, y in loader:
        F.cross_entropy(model(a), y).backward()
        optimizer.step()
    engine.detach()


@pytest.mark.parametrize("groups", [6, 3])
def test_a_normalisation_that_torch_cannot_run_on_one_example_says_why(groups):
    model = nn.Sequential(nn.Linear(D, 6), nn.GroupNorm(groups, 6), nn.Linear(6, K))
    engine, model, optimizer, loader = familiar(model, examples(1), batch_size=1)
    x, y = next(iter(loader))
    if groups == 6:
        with pytest.raises(ValueError, match="as what is drawn by chance may be of one"):
            model(x)
    else:  # the remedy
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    engine.detach()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch.compile reads where a graph ends
@pytest.mark.parametrize("mixing", [False, True])
def test_a_compiled_model_is_rehearsed(mixing):
    def forward(model, x):
        return model.outer(torch.tanh(model.inner(x / x.abs().max() if mixing else x)))

    engine, model, optimizer, loader = familiar(Model(forward), examples(NUM), batch_size=NUM)
    call = torch.compile(model, backend="eager")
    x, y = next(iter(loader))
    if mixing:
        with pytest.raises(MixesExamples):
            call(x)
    else:
        F.cross_entropy(call(x), y).backward()
        optimizer.step()
    engine.detach()


# -- what neighbours and places do not show -----------------------------------------------------------------------


def _pairs_at_odd_places(model, x):
    h = model.inner(x).unflatten(0, (-1, 2))
    return model.outer((h / h.detach().abs().amax((0, 2), keepdim=True)).flatten(0, 1))


def _largest_row(model, x):
    h, chosen = model.inner(x), torch.zeros(len(x), 1)
    chosen[x.norm(dim=1).argmax()] = 1.0
    return model.outer(h * (1 + chosen))


def _groups_of_four(model, x):
    h = model.inner(x)
    spread = h.detach().unflatten(0, (4, -1)).std(0).mean(1)
    return model.outer(h * (1 + spread.repeat(4))[:, None])


@pytest.mark.parametrize("forward", [_pairs_at_odd_places, _largest_row, _groups_of_four])
def test_attack_within_places_that_go_together_is_refused(forward):
    (first, second) = both_doors(forward)
    assert "examples beside it were replaced" in first and "examples beside it were replaced" in second


@pytest.mark.parametrize("door", ["familiar", "losses"])
def test_attack_in_parts_that_the_loop_cuts_itself_is_refused(door):
    engine, model, optimizer, loader = familiar(Model(_largest), examples(NUM), batch_size=NUM)
    with pytest.raises(MixesExamples, match="examples beside it were replaced"):
        for x, y in loader:
            optimizer.zero_grad()
            for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
                losses = F.cross_entropy(model(a), b, reduction="none")
                engine.backward(losses) if door == "losses" else losses.mean().backward()
            optimizer.step()
    engine.detach()


def test_attack_on_a_mapping_of_inputs_is_refused():
    def forward(model, batch):
        return _largest(model, batch["x"])

    assert len(both_doors(forward, call=lambda model, x: model(UserDict(x=x)))) == 2
    assert not both_doors(
        lambda model, batch: model.outer(model.inner(batch["x"])),
        call=lambda model, x: model(UserDict(x=x)),
    )


class _Prototype(nn.Module):
    """A frozen parameter that each forward writes."""

    def __init__(self, write):
        super().__init__()
        self.inner, self.outer, self.write = nn.Linear(D, 6), nn.Linear(6, K), write
        self.center = nn.Parameter(torch.zeros(D), requires_grad=False)

    def forward(self, x):
        self.write(self.center, x.detach().mean(0))
        return self.outer(self.inner(x))


def _copied(center, mean):
    with torch.no_grad():
        center.copy_(mean)


@pytest.mark.parametrize("write", [_copied, lambda center, mean: center.data.copy_(mean)])
@pytest.mark.parametrize("door", [_familiar, _explicit])
def test_attack_by_a_frozen_parameter_that_the_forward_writes_is_refused(door, write):
    with pytest.raises(RuntimeError, match="leaves parameters as they are"):
        door(_Prototype(write), 2)


class _Foreign:
    """As a class of another library keeps numbers."""

    def __init__(self):
        self.mean = torch.zeros(6)


_Foreign.__module__ = "another.library"


def test_attack_by_an_object_of_another_library_is_refused():
    def forward(model, x):
        h = model.inner(x)
        out = model.outer(h - model.foreign.mean)
        model.foreign.mean = 0.9 * model.foreign.mean + 0.1 * h.detach().mean(0)
        return out

    for door in (_familiar, _explicit):
        model = Model(forward)
        model.foreign = _Foreign()
        with pytest.raises(MixesExamples):
            door(model, 2)


def test_numbers_that_cannot_be_written_are_left_alone():
    for door in (_familiar, _explicit):
        model = Model(lambda model, x: model.outer(model.inner(x)) + float(model.table[0]))
        model.table = np.zeros(3)
        model.table.flags.writeable = False
        door(model, 2)
