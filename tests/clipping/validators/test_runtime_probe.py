# SPDX-License-Identifier: Apache-2.0
"""When the numerical probe runs, and on what: inputs that fit at construction, else the first batches."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from dpopt import MixesExamples, PrivacyEngine
from tests.support.dpopt.private_runs import D, examples, explicit, familiar, losses_of, mlp


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        y = self.head(x)
        return y + y.cumsum(0)


class Showing(nn.Module):
    """A model of vectors which brings inputs for show, as every model of transformers does."""

    def __init__(self, dummy, mixing=False, vocabulary=6):
        super().__init__()
        self.head = Mixing() if mixing else nn.Linear(D, 3)
        self.table = nn.Embedding(vocabulary, D)
        self._dummy = dummy

    @property
    def dummy_inputs(self):
        if isinstance(self._dummy, Exception):
            raise self._dummy
        return self._dummy

    def forward(self, x=None, input_ids=None):
        return self.head(self.table(input_ids).mean(1) if x is None else x)


TOKENS = torch.tensor([[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]])
UNFIT = {
    "beyond the vocabulary": {"input_ids": TOKENS},
    "an argument too many": {"input_ids": TOKENS % 6, "decoder_input_ids": TOKENS % 6},
    "a property that fails": NotImplementedError("no such setting"),
    "no tokens": {"pixel_values": torch.zeros(3, D)},
    "nothing": None,
}


@pytest.mark.parametrize("door", ["explicit", "familiar"])
@pytest.mark.parametrize("dummy", UNFIT.values(), ids=UNFIT)
def test_inputs_for_show_that_do_not_fit_leave_the_probe_to_the_first_batch(dummy, door):
    for mixing in (False, True):
        model = Showing(dummy, mixing)
        if door == "familiar":
            engine, model, optimizer, loader = familiar(model, noise=1.0)
            inputs, labels = next(iter(loader))
            if mixing:
                with pytest.raises(MixesExamples, match="to depend on that example alone"):
                    model(inputs)
            else:
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
            engine.detach()
            continue
        with explicit(model, noise=1.0) as private:
            for batch in private.batches(examples(8), steps=1):
                if mixing:
                    with pytest.raises(MixesExamples, match="to depend on that example alone"):
                        private.accumulate(losses_of(model, batch.examples))
                else:
                    private.accumulate(losses_of(model, batch.examples))
                private.release()


@pytest.mark.parametrize("vocabulary", [6, 8])
def test_inputs_for_show_are_probed_where_they_fit(vocabulary):
    model = Showing({"input_ids": TOKENS}, mixing=True, vocabulary=vocabulary)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    if vocabulary == 8:
        with pytest.raises(MixesExamples):
            familiar(model)
        with pytest.raises(MixesExamples):
            explicit(model)
    else:
        explicit(model)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("method", ["make_private", "make_private_with_epsilon"])
@pytest.mark.parametrize("given", [torch.randn(4, D), (torch.randn(4, D),), {"x": torch.randn(4, D)}], ids=["tensor", "tuple", "mapping"])  # fmt: skip
def test_example_inputs_are_probed_at_construction(method, given):
    numbers = {
        "make_private": {"noise_multiplier": 1.0},
        "make_private_with_epsilon": {"target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 1},
    }[method]
    for model, is_mixing in ((Mixing(), True), (Showing(None), False)):
        engine = PrivacyEngine(accountant="rdp")
        make = partial(
            getattr(engine, method), module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(examples(8), batch_size=4), max_grad_norm=1.0, example_inputs=given, **numbers,
        )  # fmt: skip
        if is_mixing:
            with pytest.raises(MixesExamples):
                make()
        else:
            make()
            engine.detach()


class Ragged(nn.Module):
    """One sequence for each example, in a list; `mixing` tells each of the other's mean."""

    def __init__(self, mixing):
        super().__init__()
        self.layer, self.mixing = nn.Linear(D, 3), mixing

    def forward(self, sequences):
        rows = torch.stack([x.mean(0) for x in sequences])
        return self.layer(rows - rows.mean(0) if self.mixing else rows)


def of_two(rows):
    """Two sequences of two positions: each could be taken for the batch."""
    return [x.expand(2, D).clone() for x, _ in rows], torch.tensor([int(y) for _, y in rows])


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("mixing", [False, True])
def test_a_sequence_as_long_as_the_batch_is_wide_is_no_batch(mixing, kind):
    engine, model, optimizer, loader = familiar(
        Ragged(mixing), examples(2), batch_size=2, collate_fn=lambda rows: (kind(of_two(rows)[0]), of_two(rows)[1])
    )  # fmt: skip
    sequences, labels = next(iter(loader))
    if mixing:
        with pytest.raises(MixesExamples):
            model(sequences)
    else:
        F.cross_entropy(model(sequences), labels).backward()
        optimizer.step()
        assert engine.training.sum.probing.done
    engine.detach()


class PerExample(nn.Module):
    """Returns a list of one tensor (T, 3) for each example, as detectors do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, 3)

    def forward(self, inputs):
        return list(self.layer(inputs))


def test_outputs_in_a_list_of_one_for_each_example_are_no_batches():
    data = [(torch.randn(2, D), torch.tensor(i % 3)) for i in range(2)]
    engine, model, optimizer, loader = familiar(PerExample(), data, batch_size=2)
    for inputs, labels in loader:
        F.cross_entropy(torch.stack(model(inputs)).mean(1), labels).backward()
        optimizer.step()
    engine.detach()


def test_a_model_of_features_in_a_list_is_still_probed():
    """Two tensors of two rows: neither reading of the list excuses a batch that is centred."""

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2 * D, 3)

        def forward(self, features):
            both = torch.cat(features, 1)
            return self.layer(both - both.mean(0))

    engine, model, _, loader = familiar(
        Features(), examples(2), batch_size=2, collate_fn=lambda rows: [torch.stack([x for x, _ in rows])] * 2
    )
    with pytest.raises(MixesExamples):
        model(next(iter(loader)))
    engine.detach()


@pytest.mark.parametrize("door", ["explicit", "familiar"])
def test_the_probe_reaches_nothing_outside_the_model(door):
    """A generator before the model, or an input that wants a gradient, finds none of the probe in its `.grad`."""
    model, before = mlp(), nn.Linear(D, D)
    leaf = torch.randn(8, D, requires_grad=True)
    if door == "familiar":
        engine, model, optimizer, loader = familiar(model, noise=1.0)
        _, labels = next(iter(loader))
        loss = F.cross_entropy(model(before(leaf)), labels)
        assert engine.training.sum.probing.done and leaf.grad is None and before.weight.grad is None
        loss.backward()
        optimizer.step()
        engine.detach()
    else:
        with explicit(model, noise=1.0) as private:
            for batch in private.batches(examples(8), steps=1):
                losses = model(before(leaf)).square().sum(1)
                private.sum.probing.run([losses])
                assert private.sum.probing.done and leaf.grad is None and before.weight.grad is None
                private.accumulate(losses_of(model, batch.examples))
                private.release()


def test_a_sound_model_of_the_library_keeps_its_probe():
    engine, model, optimizer, loader = familiar(mlp(), noise=1.0)
    for inputs, labels in loader:
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert engine.training.sum.probing.done
    engine.detach()


@pytest.mark.parametrize("mixing", [False, True])
def test_sequences_first_that_are_as_long_as_the_batch_is_wide_are_taken(mixing):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.LSTM(D, 5), nn.Linear(5, 3)

        def forward(self, x):  # (T, B, D)
            return self.head(self.inner(x - x.mean(1, keepdim=True) if mixing else x)[0][-1])

    def collate(rows):
        x, y = zip(*rows, strict=True)
        return torch.stack(x)[None].repeat(len(x), 1, 1), torch.stack(y)

    engine, model, optimizer, loader = familiar(Recurrent(), examples(4), batch_size=4, collate_fn=collate)
    inputs, labels = next(iter(loader))
    if mixing:
        with pytest.raises(MixesExamples):
            F.cross_entropy(model(inputs), labels).backward()
    else:
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    engine.detach()
