# SPDX-License-Identifier: Apache-2.0
"""Attacks on estimators that once worked, or would where something is refused: each says what it would gain.

A shift is the distance between what two neighbouring datasets release, over the noise that is drawn at noise
multiplier 1: above 1, the charge is too small.

Shapes: B examples, T positions.
"""

import math
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from accountants import UnpricedEvent, leaves
from clipping import Clipping, Dense, Sums
from clipping.contributions.error_feedback import HiddenState
from clipping.contributions.record_memory import Memory
from clipping.recording import deliveries
from dpopt import GaussianMechanism, PoissonSampling, PrivacyEngine, PrivateTraining
from dpopt.estimators import Centred, Clip21, Dice, Run, Scheduled, TwoThreshold, named_estimator
from dpopt.estimators.step_mechanism import mechanism_of
from dpopt.release.release import noise_stds
from tests.support.dpopt.estimator_runs import collect, gradient_of, mlp, opened, vectors
from tests.support.dpopt.private_runs import familiar, losses_of

C, N = 0.5, 8
TEXTS = (
    "quantile",
    "slack",
    "median",
    "huber",
    "coordinate_median",
    "geometric_median",
    "two_threshold",
    "clip21",
    "diff2",
    "dice",
    "dice:bound=2",
)


def whitened(private):
    """All that the collected step releases, each number over the standard deviation of its noise."""
    mechanism = mechanism_of(private.estimator, private.mechanism, private.payments.number(private._begun))
    clipped = private.sum.clipped()
    stds = noise_stds(mechanism, clipped, 1.0)
    return torch.cat([clipped.total[name].double().flatten() / std for name, std in stds.items()])


def begun(private, num):
    """The indices of a draw of everybody."""
    draw = private.draw(num)
    private.begin(draw.number, num, draw.indices)
    return draw.indices


# -- records that are emptied ------------------------------------------------------------------------------------

SPEAKING = ["median", "huber", "coordinate_median", "geometric_median", "quantile", "slack"]
SILENT = ["flat", "per_layer", "schedule:steps=3", "two_threshold", "clip21", "diff2", "dice", "dice:bound=2"]


def when_emptied(text, *, weight, centre=None):
    """One step on records without much of a gradient, the last of which has a long one, times `weight`."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    inputs = 1e-3 * torch.randn(N, 4).double()
    inputs[-1] = 30.0
    weights = torch.ones(N).double()
    weights[-1] = weight
    with opened(model, text, clip=1.0, num=N, noise=1.0) as private:
        if centre is not None:
            private.estimator.centre["weight"] = torch.full((1, 4), centre).double()
        indices = begun(private, N)
        private.accumulate(model(inputs).squeeze(1) * weights, records=indices)
        return whitened(private)


ZEROED = [  # text, centre, how far an emptied record moves the release
    ("median", 2.0, 2.0),
    ("coordinate_median", 2.0, 2.0),
    ("quantile:share=0.9", None, math.sqrt(0.1 + 0.9 * 4)),
    ("slack", None, math.sqrt(2 - 0.4**2)),
    ("two_threshold", None, None),
    ("flat", None, None),
]


@pytest.mark.parametrize(("text", "centre", "expected"), ZEROED)
def test_an_emptied_record_that_speaks_is_worth_up_to_two(text, centre, expected):
    """Why there is no price: around a centre and in a count, no gradient is a gradient of 0."""
    shift = (
        when_emptied(text, weight=1.0, centre=centre) - when_emptied(text, weight=0.0, centre=centre)
    ).norm()
    if expected is None:
        assert shift <= 1 + 1e-6
    else:
        assert shift == pytest.approx(expected, rel=1e-3)
        speaks = named_estimator(text, Run(mlp(), C, N, PoissonSampling(1.0, 8.0))).speaks_of_zero
        assert speaks is (text in SPEAKING or text.startswith("quantile"))


@pytest.mark.parametrize("text", SPEAKING)
def test_a_record_that_speaks_empty_has_no_price_under_zero_out(text):
    match = (
        "a record without a gradient adds nothing, under the relation zero-out-one; got .*; use replace-one"
    )
    with pytest.raises(UnpricedEvent, match=match):
        opened(mlp(), text, noise=1.0, relation="zero-out-one")
    engine = PrivacyEngine(accountant="rdp", relation="zero-out-one")
    with pytest.raises(UnpricedEvent, match=match):
        familiar(mlp(), dataset(), clipping=text, noise=1.0, engine=engine)
    for relation in ("replace-one", "add-or-remove-one"):
        opened(mlp(), text, noise=1.0, relation=relation)


@pytest.mark.parametrize("text", SILENT)
def test_a_record_that_is_silent_when_empty_has_one(text):
    opened(mlp(), text, noise=1.0, rate=0.5, relation="zero-out-one")


def test_a_centre_that_is_not_tracked_is_silent():
    opened(mlp(), Centred(C, tracked=False), noise=1.0, relation="zero-out-one")
    with pytest.raises(UnpricedEvent):
        opened(mlp(), Centred(C, rounds=2, tracked=False), noise=1.0, relation="zero-out-one")


def dataset():
    return TensorDataset(*(torch.stack(column) for column in zip(*vectors(N), strict=True)))


# -- names ---------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Two layers of given names."""

    def __init__(self, one, other):
        super().__init__()
        self.add_module(one, nn.Linear(4, 1, bias=False))
        self.add_module(other, nn.Linear(4, 1, bias=False))

    def forward(self, inputs):
        return sum(layer(inputs) for layer in self.children()).squeeze(1)


class Counted(nn.Module):
    """A parameter named like a count."""

    def __init__(self):
        super().__init__()
        self.register_parameter("count:below", nn.Parameter(torch.zeros(4)))

    def forward(self, inputs):
        return inputs @ self.get_parameter("count:below")


NAMES = [
    ("two_threshold", lambda: Named("fc", "rest:fc"), "rest:fc.weight"),
    ("dice", lambda: Named("fc", "rest:fc"), "rest:fc.weight"),
    ("geometric_median", lambda: Named("x", "1>x"), "1>x.weight"),
    ("flat", lambda: Named("x", "1>x"), "1>x.weight"),
    ("quantile", Counted, "count:below"),
    ("slack", Counted, "count:below"),
]


@pytest.mark.parametrize(("text", "build", "name"), NAMES)
def test_names_that_would_be_taken_for_another_vector_are_refused(text, build, name):
    """One would get the other's noise or sum: the rest of a hidden error in the open, the same noise twice."""
    match = f"expected parameter names that no other released vector has, without '>'; got .*{name}.*; rename"
    with pytest.raises(ValueError, match=match):
        opened(build(), text, noise=1.0)
    model = build()
    with pytest.raises(ValueError, match=match):
        familiar(model, TensorDataset(torch.zeros(8, 4), torch.zeros(8)), clipping=text, noise=1.0)


@pytest.mark.parametrize("text", ["two_threshold", "dice"])
def test_names_that_only_look_alike_are_none_of_it(text):
    opened(Named("rest:a", "b"), text, noise=1.0)
    opened(Named("fc", "rest:fc"), "flat", noise=1.0)


# -- what one run remembers in another ------------------------------------------------------------------------------


def steps_of(private, model, num=3):
    """The gradients of `num` steps on everybody, at parameters that stay."""
    found = []
    data = vectors(N)
    for batch in private.batches(data, steps=num):
        collect(private, model, losses_of, batch)
        private.release()
        found.append(gradient_of(model))
    return torch.stack(found)


@pytest.mark.parametrize("text", TEXTS)
def test_an_estimator_begins_anew_in_each_run_and_each_time_it_is_entered(text):
    """Hidden feedback of one run in another is paid for in neither; public state would be another run's."""
    model = mlp()
    estimator = named_estimator(text, Run(model, C, N, PoissonSampling(1.0, float(N))))
    private = opened(model, estimator)
    with private:
        first = steps_of(private, model)
    held = private.estimator
    with private:
        assert private.estimator is not held and private.estimator is not estimator
        torch.testing.assert_close(steps_of(private, model), first, rtol=1e-12, atol=1e-12)
    with opened(model, estimator) as other:
        torch.testing.assert_close(steps_of(other, model), first, rtol=1e-12, atol=1e-12)
    with opened(model, held) as other:  # also where somebody takes it out of a run
        torch.testing.assert_close(steps_of(other, model), first, rtol=1e-12, atol=1e-12)
    assert text == "diff2" or not torch.equal(first[0], first[1])  # there is something to remember


def test_hidden_state_starts_empty_in_each_run():
    """As it was priced: 30 steps at next to no noise would buy a record that speaks in a second run at no charge."""
    model, estimator = mlp(), Dice(C, 0.1, bound=2.0)
    private = opened(model, estimator, noise=0.0)
    for _ in range(2):
        with private:
            assert not private.estimator.state._state
            steps_of(private, model)
            assert private.estimator.state._state and private.estimator.state is not estimator.state
    with opened(model, estimator) as other:
        assert not other.estimator.state._state
    assert not estimator.state._state


# -- places of records ------------------------------------------------------------------------------------------------


class Placed(torch.utils.data.Dataset):
    """(number, inputs, label): a dataset whose items carry their place."""

    def __len__(self):
        return N

    def __getitem__(self, number):
        return (number, *vectors(N)[number])


def as_drawn(rows):
    numbers, inputs, labels = zip(*rows, strict=True)
    return torch.tensor(numbers), torch.stack(inputs), torch.stack(labels)


def by_length(rows):
    return as_drawn(sorted(rows, key=lambda row: float(row[1].norm())))


def trained(collate, records_of, epochs=4):
    """Gradients of clip21 in the familiar door, where `collate` orders the rows."""
    engine, model, optimizer, loader = familiar(
        mlp(),
        Placed(),
        batch_size=4,
        max_grad_norm=C,
        clipping="clip21:rate=1",
        collate_fn=collate,
        engine=PrivacyEngine(accountant="rdp", insecure_seed=1),
    )
    found = []
    for _ in range(epochs):
        for numbers, inputs, labels in loader:
            records = records_of(numbers)
            engine.evaluate(
                lambda x=inputs, y=labels: F.cross_entropy(model(x), y, reduction="none"), records=records
            )
            optimizer.step()
            found.append(gradient_of(model))
    engine.detach()
    return torch.stack(found)


def test_records_are_those_that_the_rows_name_whatever_their_order():
    honest = trained(as_drawn, lambda numbers: numbers.tolist())
    torch.testing.assert_close(
        trained(by_length, lambda numbers: numbers.tolist()), honest, rtol=1e-6, atol=1e-9
    )
    # rows of one record under the name of another: one record would move the memories of all
    assert not torch.allclose(trained(by_length, lambda numbers: sorted(numbers.tolist())), honest)


def test_the_familiar_door_does_not_guess_records():
    engine, model, optimizer, loader = familiar(
        mlp(), dataset(), clipping="clip21", engine=PrivacyEngine(accountant="rdp", insecure_seed=1)
    )
    for inputs, labels in loader:

        def losses(x=inputs, y=labels):
            return F.cross_entropy(model(x), y, reduction="none")

        with pytest.raises(ValueError, match="rows without records; pass records="):
            engine.evaluate(losses)
        engine.discard()
        engine.evaluate(losses, records=range(N))
        optimizer.step()
    engine.detach()


def test_memories_go_with_one_dataset():
    """Places in a shuffled copy are other records: each step would move many memories by one record."""
    model, data = mlp(), vectors(N)
    private = opened(model, Clip21(C, N, 1.0))
    match = f"expected the one dataset of {N} records whose places .*; got another one; use a run of its own"
    with private:
        for _ in range(2):
            for batch in private.batches(data, steps=1):
                collect(private, model, losses_of, batch)
                private.release()
        for other in (data[::-1], list(data), data[1:], data * 2):
            with pytest.raises(ValueError, match=match):
                next(private.batches(other, steps=1))
        assert private.ledger.num_charges == 2
    with private:  # its memories are empty again
        for batch in private.batches(data[::-1], steps=1):
            collect(private, model, losses_of, batch)
            private.release()
    with opened(model, "flat") as plain:
        for other in (data, data[::-1], data[1:]):
            for batch in plain.batches(other, steps=1):
                collect(plain, model, losses_of, batch)
                plain.release()


def test_a_memory_that_is_cleared_is_new():
    memory = Memory(2, 1.0, 1.0)

    def sent():
        contribution = memory.contribution().of_records([0])
        sums = Sums(contribution, contribution.clipper.groups(["w"]))
        collector = Clipping(sums, lambda name: False, lambda num: None)
        collector.ready("w", Dense(torch.tensor([[3.0, 4.0]])), 1)
        collector.complete(1)
        memory.keep()
        return sums.totals["w"]

    first = sent()
    for _ in range(5):
        sent()
    assert sent().norm() < 1e-5 < first.norm()  # all has been sent
    memory.clear()
    assert torch.equal(sent(), first)


# -- rounding ---------------------------------------------------------------------------------------------------------


def test_rounding_does_not_lengthen_what_a_record_left_in_the_hidden_state():
    """Others fill the state to 10^8 clip norms and empty it; in float32 each step would round two neighbours apart."""
    size, steps, length = 512, 100, 1e6
    generator = torch.Generator().manual_seed(0)
    others = F.normalize(torch.randn(size, generator=generator, dtype=torch.float64), dim=0)
    mine = F.normalize(torch.randn(size, generator=generator, dtype=torch.float64), dim=0)

    def run(victim):
        state, rounded, longest = HiddenState(1.0), torch.zeros(size), []
        for t in range(2 * steps):
            away = length * (1 + 0.1 * math.sin(t)) * (1 if t < steps else -1)
            cut = (mine * victim if t == 1 else others * away).float()
            state.give({"w": torch.zeros(size)}, {"w": cut})
            state.keep()
            rounded = rounded + cut
            longest.append((state._state["w"].clone(), rounded))
        return longest

    differences = [
        ((a - b).norm().item(), (x.double() - y.double()).norm().item())
        for (a, x), (b, y) in zip(run(1.0), run(0.0), strict=True)
    ]
    ours, rounded = (max(column) for column in zip(*differences, strict=True))
    assert ours <= 1 + 1e-6 < 1.1 < rounded
    assert HiddenState(1.0).give({"w": torch.zeros(2)}, {"w": torch.ones(2)})["w"].dtype == torch.float32


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def step_in(how, num, reduction):
    """The sum of one step on `num` equal examples in the familiar door, in clip norms; none is clipped."""
    model = nn.Linear(16, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    model, block = model.to(dtype), nullcontext if how == "bfloat16" else autocast
    inputs = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)).expand(num, -1).to(dtype)
    engine, model, _, loader = familiar(
        model,
        TensorDataset(inputs, torch.zeros(num, dtype=torch.long)),
        batch_size=num,
        max_grad_norm=4.0,
        loss_reduction=reduction,
        engine=PrivacyEngine(accountant="rdp", insecure_seed=1),
    )
    with engine:
        x, y = next(iter(loader))
        with block():
            loss = F.cross_entropy(model(x), y, reduction=reduction)
        loss.backward()
        total = engine.training.sum.clipped().total
    return torch.cat([value.double().flatten() for value in total.values()]) / 4.0


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_means_of_losses_in_few_bits_are_refused(how, monkeypatch):
    """1/B in bfloat16 comes back times B: at some B one more example rescales all of the others."""
    with pytest.raises(
        TypeError, match=r"expected the sum of the losses .*; got their mean.*; use reduction=.sum"
    ):
        step_in(how, 257, "mean")
    num = max(range(1024, 1400), key=lambda n: abs(_effective(n + 1) - _effective(n)))
    assert (step_in(how, num + 1, "sum") - step_in(how, num, "sum")).norm() <= 1 + 1e-5
    monkeypatch.setattr(deliveries, "refuse_rounded", lambda *args, **options: None)
    assert (step_in(how, num + 1, "mean") - step_in(how, num, "mean")).norm() > 1.3


def _effective(num):
    return num * float(torch.tensor(1 / num).bfloat16())


def test_means_in_few_bits_are_refused_in_the_explicit_door():
    model = nn.Linear(16, 2).bfloat16()
    options = {"estimator": TwoThreshold(1.0, 4.0), "mechanism": GaussianMechanism(1.0)}
    sampling = PoissonSampling(1.0, 3.0)
    for mean in (True, False):
        with PrivateTraining(
            model, sampling=sampling, mean_losses=mean, accountant_name="rdp", **options
        ) as private:
            begun(private, 3)
            refused = pytest.raises(TypeError, match="reduction") if mean else nullcontext()
            with refused:
                private.accumulate(model(torch.ones(3, 16).bfloat16()).float().square().sum(1))


# -- autocast around the whole of a step --------------------------------------------------------------------------------


class Positions(nn.Module):
    """A linear layer over (B, T, 16)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 12, bias=False)

    def forward(self, inputs):
        return self.layer(inputs)


def inside(text, positions, num, *, around, exact_forwards):
    """One step of `num` examples, each by itself, `around` everything but the release."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, positions, 16, generator=generator).bfloat16().float()
    targets = torch.randn(3, positions, 12, generator=generator)
    elsewhere = 0.3 * torch.randn(12, 16, generator=generator)
    model = Positions()
    name = "layer.weight"
    with opened(model, text, clip=1e-2, num=3, noise=1.0) as private:
        if text.startswith("diff2"):
            private.estimator.last[name] = model.layer.weight.detach() + 1e-3 * elsewhere
            private.estimator.gradient[name] = torch.zeros(12, 16)
            private.payments.rounds.charged = 1
        if text.startswith("median"):
            private.estimator.centre[name] = elsewhere
        begun(private, num)
        assert (private._stage.previous is not None) is text.startswith("diff2")

        def losses(i):
            with torch.autocast("cpu", enabled=False) if exact_forwards else nullcontext():
                out = model(inputs[i : i + 1]).float()
                return (out * targets[i : i + 1]).sum((1, 2)) + 0.5 * out.square().sum((1, 2))

        with around():
            for i in range(num):
                if text == "flat" and exact_forwards:
                    with private.same_examples():
                        private.accumulate(losses(i))
                        private.accumulate(-0.999 * losses(i))
                else:
                    private.evaluate(lambda i=i: losses(i))
            clipped = private.sum.clipped()  # a batch that is held is summed here
    return clipped.total[name].double() / clipped.sensitivity


HELD = ["flat", "diff2:smoothness=1", "geometric_median"]


@pytest.mark.parametrize("positions", [1, 200])
@pytest.mark.parametrize("text", HELD)
def test_blocks_and_held_batches_are_clipped_in_full_precision(text, positions):
    """Where nothing of the user's was rounded, autocast around the step changes nothing."""
    arguments = {"positions": positions, "num": 3, "exact_forwards": True}
    plain = inside(text, **arguments, around=nullcontext)
    torch.testing.assert_close(inside(text, **arguments, around=autocast), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", [1, 200])
@pytest.mark.parametrize("text", ["flat", "median", "two_threshold", "diff2:smoothness=1"])
def test_one_example_moves_the_sum_by_its_sensitivity_inside_autocast(text, positions):
    one, other = (inside(text, positions, num, around=autocast, exact_forwards=False) for num in (2, 3))
    assert (one - other).norm() <= 1 + 1e-5


# -- charges -----------------------------------------------------------------------------------------------------------


def test_what_is_charged_is_the_noise_of_each_attempt(monkeypatch):
    """A schedule goes on where a release fails, and begins anew where a run is entered again."""
    used, original = [], GaussianMechanism.release

    def release(self, clipped, noise, divisor=1.0):
        used.append(self.noise_multiplier)
        if len(used) == 3:
            raise torch.OutOfMemoryError("in the noise")
        return original(self, clipped, noise, divisor)

    monkeypatch.setattr(GaussianMechanism, "release", release)
    model = mlp()
    private = opened(model, Scheduled(C, 10, noise_end=0.2), noise=2.0, rate=0.5)
    for _ in range(2):
        with private:
            for batch in private.batches(vectors(N), steps=5):
                collect(private, model, losses_of, batch)
                with pytest.raises(torch.OutOfMemoryError) if len(used) == 2 else nullcontext():
                    private.release()
            charged = Counter(
                {leaf.event.noise_multiplier: count for leaf, count in leaves(private.ledger.events())}
            )
    assert charged == Counter(used) and len(charged) == 5
