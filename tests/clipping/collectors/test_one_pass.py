# SPDX-License-Identifier: Apache-2.0
"""Release inside the backward: a parameter is clipped whole, once, in one norm, whatever the graph looks like."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from clipping import per_layer
from tests.support.clipping.subjects import (
    SUBJECTS,
    D,
    Recorder,
    clipped_by_hand,
    clippers,
    example_gradients,
    ids,
    squares,
)

B = 4


class Logged(Recorder):
    """Notes which parameters come, in order, and which group is closed when."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log = []

    def begin(self, idle):
        collector = super().begin(idle)
        ready, close = collector.ready, collector._close
        collector.ready = lambda name, grads, n: (self.log.append(name), ready(name, grads, n))[1]
        collector._close = lambda row, n: (self.log.append(row), close(row, n))[1]
        return collector

    @property
    def names(self):
        return [x for x in self.log if isinstance(x, str)]


def deep(layers=4):
    return nn.Sequential(*[nn.Linear(D, D) for _ in range(layers)]).double()


def by_loop(model, x, clipper):
    subject = SUBJECTS["mlp"]
    return clipped_by_hand(example_gradients(subject, model, (x,), len(x)), clipper)


def assert_close(recorder, expected):
    for name, value in expected.items():
        torch.testing.assert_close(recorder.total()[name], value, rtol=1e-9, atol=1e-9)


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    "name", ["layer used twice", "several forward calls", "tied through a generic module", "RNN cells"]
)
def test_a_parameter_of_several_calls_comes_once(name):
    subject = SUBJECTS[name]
    model = subject.build().double()
    with Logged(model, per_layer(model, 1.0)) as recorder:
        subject.run(model, subject.inputs(B)).sum().backward()
    assert sorted(recorder.names) == sorted(set(recorder.names))
    rows = [x for x in recorder.log if isinstance(x, int)]
    assert len(rows) == len(set(rows))


def test_layers_are_released_while_the_backward_runs():
    model, x = deep(), data(B, D)
    with Logged(model, per_layer(model, 1.0)) as recorder:
        squares(model(x)).sum().backward()
    rows = {name: row for row, names in enumerate(recorder.sums.groups) for name in names}
    last = recorder.names[-1]
    closed = [x for x in recorder.log[: recorder.log.index(last)] if isinstance(x, int)]
    assert sorted({*closed, rows[last]}) == sorted(set(rows.values()))


def test_what_late_layers_held_is_gone_before_early_layers_deliver():
    model, kept, alive = deep(), [], []
    with Recorder(model, per_layer(model, 1.0)) as recorder:
        begin = recorder.begin

        def watched(idle):
            collector = begin(idle)
            ready = collector.ready

            def taken(name, grads, n):
                alive.append(sum(held() is not None for held in kept))
                kept.append(weakref.ref(grads.left if hasattr(grads, "left") else grads.values))
                ready(name, grads, n)

            collector.ready = taken
            return collector

        recorder.tape.deliveries._begin = watched
        squares(model(data(B, D))).sum().backward()
    assert len(kept) == 8 and max(alive) <= 2, alive  # one layer's structures, not those of all


def test_a_forward_whose_output_is_never_used_holds_its_parameters_to_the_end():
    model, x = deep(), data(B, D)
    clipper = per_layer(model, 0.5)
    with Logged(model, clipper) as recorder:
        unused = model(data(B, D))
        squares(model(x)).sum().backward()
        assert unused.requires_grad and recorder.names == list(dict.fromkeys(recorder.names))
    assert_close(recorder, by_loop(model, x, clipper))


def test_two_forwards_before_their_backwards():
    model, x, y = deep(), data(B, D), data(B, D)
    clipper = per_layer(model, 0.5)
    with Recorder(model, clipper) as recorder:
        first, second = squares(model(x)).sum(), squares(model(y)).sum()
        first.backward()
        second.backward()
    assert recorder.sizes == [B, B]
    assert_close(recorder, by_loop(model, torch.cat((x, y)), clipper))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = deep(2), deep(2)

    def forward(self, x):
        self.hidden = self.a(x)
        return self.b(self.hidden), self.hidden


@pytest.mark.parametrize("kind", ["flat", "per_layer"])
@pytest.mark.parametrize("how", ["retained", "one output each"])
def test_guarantee_one_forward_is_clipped_once(how, kind):
    # Each way sends parts of one example's gradient through two backwards, to be clipped in two norms.
    model, x = Whole(), data(B, D)
    with Recorder(model, clippers(model, 1.0)[kind]) as recorder:
        out, hidden = model(x)
        loss = squares(out).sum()
        loss.backward(retain_graph=True)
        again = loss.backward if how == "retained" else squares(hidden).sum().backward
        before = {n: t.clone() for n, t in recorder.sums.totals.items()}
        with pytest.raises(
            RuntimeError, match="expected one backward through each forward of the model; got a second"
        ):
            again()
    assert recorder.sizes == [B] and all(torch.equal(recorder.sums.totals[n], t) for n, t in before.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["flat", "per_layer"])
@pytest.mark.parametrize("how", ["grad", "inputs"])
def test_a_backward_for_given_tensors_is_none_of_the_parameters(how, kind):
    """As in torch, which forms no gradient of parameters then; the backward that goes on from there is the only one."""
    model, x = Whole(), data(B, D)
    clipper = clippers(model, 0.5)[kind]
    gradients = []
    for row in x:
        plain = copy.deepcopy(model)
        out, hidden = plain(row[None])
        (back,) = torch.autograd.grad(squares(out).sum(), hidden, retain_graph=True)
        hidden.backward(back)
        zero = {n: torch.zeros_like(p) for n, p in plain.named_parameters()}
        gradients.append(zero | {n: p.grad for n, p in plain.named_parameters() if p.grad is not None})
    with Recorder(model, clipper) as recorder:
        out, hidden = model(x)
        if how == "grad":
            (back,) = torch.autograd.grad(squares(out).sum(), hidden, retain_graph=True)
        else:
            hidden.retain_grad()
            squares(out).sum().backward(inputs=[hidden], retain_graph=True)
            back = hidden.grad
        assert recorder.sizes == [] and not recorder.sums.totals
        hidden.backward(back)
    assert recorder.sizes == [B] and all(p.grad is None for p in model.parameters())
    for name, value in clipped_by_hand(gradients, clipper).items():
        if name.startswith("a."):
            torch.testing.assert_close(recorder.total()[name], value)
        else:
            assert not value.any()


def test_a_backward_inside_another_is_clipped_by_itself():
    model, x, y = deep(), data(B, D), data(3, D)
    clipper = per_layer(model, 0.5)
    with Recorder(model, clipper) as recorder:
        inner = squares(model(y)).sum()
        hidden = model[:2](x)
        hidden.register_hook(lambda _: inner.backward())
        squares(model[2:](hidden)).sum().backward()
    assert sorted(recorder.sizes) == [3, B]
    assert_close(recorder, by_loop(model, torch.cat((x, y)), clipper))


def forward_and_back(model):
    with torch.enable_grad():
        squares(model(data(B, D))).sum().backward()


def test_a_forward_inside_a_backward_is_refused_when_it_is_sent_back():
    model, x = deep(), data(B, D)
    with Recorder(model, per_layer(model, 1.0)) as recorder:
        hidden = model[:2](x)
        hidden.register_hook(lambda _: forward_and_back(model))
        with pytest.raises(RuntimeError, match="to run before the backward"):
            squares(model[2:](hidden)).sum().backward()
    assert all(p.grad is None for p in model.parameters()) and recorder.tape.deliveries._records == {}


def test_calls_that_are_gone_hold_nothing_and_stand_for_nothing():
    model, x = deep(), data(B, D)
    clipper = per_layer(model, 0.5)
    with Logged(model, clipper) as recorder:
        for _ in range(20):  # their ids are free again
            model(data(B, D))
        gc.collect()
        assert not any(recorder.tape._calls.values())
        squares(model(x)).sum().backward()
        gc.collect()  # of the log's own cycle
        assert not any(recorder.tape._calls.values())
    assert_close(recorder, by_loop(model, x, clipper))


def test_backwards_of_two_threads_are_clipped_by_themselves():
    model, x, y = deep(), data(B, D), data(B, D)
    clipper = per_layer(model, 0.5)
    with Recorder(model, clipper) as recorder:
        losses = [squares(model(x)).sum(), squares(model(y)).sum()]
        threads = [threading.Thread(target=loss.backward) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert recorder.sizes == [B, B]
    assert_close(recorder, by_loop(model, torch.cat((x, y)), clipper))


def test_ids_of_examples_stay_apart():
    model = SUBJECTS["layer used twice"].build().double()
    clipper = per_layer(model, 0.3)
    inputs = ids(B)
    with Recorder(model, clipper) as recorder:
        squares(model(*inputs)).sum().backward()
    expected = clipped_by_hand(example_gradients(SUBJECTS["layer used twice"], model, inputs, B), clipper)
    assert_close(recorder, expected)
