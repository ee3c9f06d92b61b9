# SPDX-License-Identifier: Apache-2.0
"""What estimators refuse, and that steps which fail or are given up leave no trace in what they remember.

A trace is any change of an estimator's attributes: centres, averages, clip norms, memories, hidden state.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from clipping import Sums
from dpopt import GaussianMechanism, PoissonSampling, PrivacyEngine, PrivateTraining
from dpopt.estimators import (
    Centred,
    Clip21,
    Dice,
    Difference,
    Quantile,
    Run,
    Scheduled,
    Slack,
    TwoThreshold,
    check_estimator,
    named_estimator,
)
from dpopt.mechanisms import GridGaussianMechanism, GroupGaussianMechanism
from dpopt.sampling import FixedSizeSampling, TruncatedPoissonSampling
from dpopt.sampling.registry import sized
from tests.support.dpopt.estimator_runs import collect, flat, gradient_of, mlp, opened, vectors
from tests.support.dpopt.private_runs import familiar, losses_of

C, N = 0.5, 8
TEXTS = (
    "flat",
    "per_layer",
    "quantile",
    "slack",
    "median",
    "huber",
    "coordinate_median",
    "geometric_median",
    "two_threshold",
    "clip21",
    "clip21:restart=2",
    "diff2:restart=2",
    "diff2:restart=10",
    "dice",
    "dice:bound=2",
)


def named(text, model, sampling=None):
    return named_estimator(text, Run(model, C, N, sampling or PoissonSampling(1.0, float(N))))


def remembered(estimator):
    """A copy of everything that an estimator holds, hidden state too."""
    held = {}
    for name in type(estimator).__dataclass_fields__:
        value = getattr(estimator, name)
        if name == "memory":
            value = value._rows
        elif name == "state":
            value = value._state
        elif name == "level":
            value = copy.copy(value)
        elif name == "contribution":
            continue
        held[name] = {k: v.clone() for k, v in value.items()} if isinstance(value, dict) else value
    return held


def assert_same_memory(one, other):
    for name, value in one.items():
        if isinstance(value, dict):
            assert value.keys() == other[name].keys(), name
            for key, tensor in value.items():
                torch.testing.assert_close(tensor, other[name][key], rtol=0, atol=0)
        elif not callable(value):
            assert value == other[name], name


def run(text, between=lambda private, model, batch, step: None, *, steps=4):
    """The gradients of a run on everybody; `between` happens before each batch is collected."""
    model, found = mlp(), []
    estimator = named(text, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    with opened(model, estimator, clip=C, num=N) as private:
        for step, batch in enumerate(private.batches(vectors(N), steps=steps)):
            between(private, model, batch, step)
            collect(private, model, losses_of, batch, 5)
            private.release()
            found.append(gradient_of(model))
            optimizer.step()
    return found


def assert_same_run(text, between):
    for step, (one, other) in enumerate(zip(run(text), run(text, between), strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=f"another gradient in step {step}")


# -- steps that are given up -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_discarded_batch_leaves_no_trace(text):
    def discarded(private, model, batch, step):
        before = remembered(private.estimator)
        collect(private, model, losses_of, batch, 5)
        private.discard()
        assert_same_memory(before, remembered(private.estimator))

    assert_same_run(text, discarded)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("text", TEXTS)
def test_memory_that_runs_out_midway_leaves_no_trace(text, at, monkeypatch):
    """The sum fails at its `at`-th parameter; the batch is given up and run again."""
    original, left = Sums.add, []

    def fails(self, *args):
        if left and left.pop() == 0:
            raise torch.OutOfMemoryError("half-way")
        original(self, *args)

    monkeypatch.setattr(Sums, "add", fails)

    def out_of_memory(private, model, batch, step):
        if private.estimator.stage(step).rounds > 1:
            return  # kept, not summed: the next test fails it
        before = remembered(private.estimator)
        left[:] = [0, *[1] * (at - 1)]
        with pytest.raises(torch.OutOfMemoryError):
            collect(private, model, losses_of, batch, 5)
        left.clear()
        private.discard()
        assert_same_memory(before, remembered(private.estimator))

    assert_same_run(text, out_of_memory)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise ArithmeticError("in the backward")


@pytest.mark.parametrize("text", TEXTS)
def test_a_backward_that_fails_leaves_no_trace(text):
    def failing(private, model, batch, step):
        before = remembered(private.estimator)
        private.evaluate(lambda: losses_of(model, batch.examples[:3]), records=batch.indices[:3])
        with pytest.raises(ArithmeticError):
            private.evaluate(
                lambda: Fails.apply(losses_of(model, batch.examples[3:])), records=batch.indices[3:]
            )
        private.discard()
        assert_same_memory(before, remembered(private.estimator))

    assert_same_run(text, failing)


def test_a_second_forward_that_fails_leaves_the_parameters_where_they_were():
    model = mlp()
    with opened(model, named("diff2", model)) as private:
        for step, batch in enumerate(private.batches(vectors(N), steps=2)):
            calls, before = [], flat(model.parameters())

            def losses(calls=calls, batch=batch):
                calls.append(flat(model.parameters()))
                if len(calls) == 2:
                    raise ArithmeticError("in the second forward")
                return losses_of(model, batch.examples)

            if step == 1:
                with pytest.raises(ArithmeticError):
                    private.evaluate(losses)
                assert len(calls) == 2 and not torch.equal(*calls)
                assert torch.equal(flat(model.parameters()), before)
                private.discard()
            collect(private, model, losses_of, batch)
            private.release()
            torch.optim.SGD(model.parameters(), lr=0.2).step()


def leave_in_the_middle(private, model, steps):
    for step, batch in enumerate(private.batches(vectors(N), steps=steps + 1)):
        collect(private, model, losses_of, batch)
        if step == steps:
            return
        private.release()


@pytest.mark.parametrize("text", TEXTS)
def test_a_run_that_ends_before_a_release_leaves_no_trace(text):
    model = mlp()
    estimator = named(text, model)
    with opened(model, estimator) as private:
        leave_in_the_middle(private, model, 2)
        after = remembered(private.estimator)
    assert_same_memory(after, remembered(private.estimator))
    other = mlp()
    with opened(other, named(text, other)) as private:
        for step, batch in enumerate(private.batches(vectors(N), steps=2)):
            assert step < 2
            collect(private, other, losses_of, batch)
            private.release()
    assert_same_memory(remembered(private.estimator), after)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("text", TEXTS)
def test_a_release_that_fails_after_its_charge_leaves_no_trace(text, at, monkeypatch):
    """The charge stays; state and gradients are as before, and the next batch is released as if nothing had been."""
    fails = []
    for kind in (GaussianMechanism, GroupGaussianMechanism):

        def release(self, clipped, noise, divisor=1.0, original=kind.release):
            if fails:
                raise torch.OutOfMemoryError("in the noise")
            return original(self, clipped, noise, divisor)

        monkeypatch.setattr(kind, "release", release)
    model = mlp()
    estimator = named(text, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    released = 0
    with opened(model, estimator) as private:
        for step, batch in enumerate(private.batches(vectors(N), steps=5)):
            collect(private, model, losses_of, batch, 5)
            before = remembered(private.estimator)
            if step == at:
                fails.append(True)
                with pytest.raises(torch.OutOfMemoryError):
                    private.release()
                fails.clear()
                assert_same_memory(before, remembered(private.estimator))
            else:
                private.release()
                released += 1
                optimizer.step()
                assert all(torch.isfinite(p).all() for p in model.parameters())
        assert private.ledger.num_charges == 5 and released == 4


@pytest.mark.parametrize("text", TEXTS)
def test_a_stage_changes_nothing(text):
    model = mlp()
    with opened(model, named(text, model)) as private:
        for batch in private.batches(vectors(N), steps=2):
            collect(private, model, losses_of, batch)
            private.release()
    estimator = private.estimator
    before = remembered(estimator)
    for step in (0, 1, 2, 10):
        estimator.stage(step)
    assert_same_memory(before, remembered(estimator))


@pytest.mark.parametrize("text", ["clip21", "dice"])
def test_what_is_hidden_is_not_copied(text):
    estimator = named(text, mlp())
    hidden = estimator.memory if text == "clip21" else estimator.state
    with pytest.raises(
        TypeError, match=r"expected .* to stay in the run that made it; got a copy or a pickle"
    ):
        copy.deepcopy(hidden)
    assert "hidden" not in repr(estimator) and "hidden" in repr(hidden)


# -- backwards that an estimator cannot use --------------------------------------------------------------------------


def dataset():
    return TensorDataset(*(torch.stack(column) for column in zip(*vectors(N), strict=True)))


def test_differences_name_evaluate_in_the_explicit_door():
    model = mlp()
    with opened(model, "diff2") as private:
        for step, batch in enumerate(private.batches(vectors(N), steps=2)):
            if step == 0:
                private.accumulate(losses_of(model, batch.examples))
            else:
                for _ in range(2):
                    with pytest.raises(RuntimeError, match=r"as a function.*call evaluate\(lambda: losses"):
                        private.accumulate(losses_of(model, batch.examples))
                collect(private, model, losses_of, batch)
            private.release()
            torch.optim.SGD(model.parameters(), lr=0.2).step()


def test_differences_name_evaluate_in_the_familiar_door():
    engine = PrivacyEngine(accountant="rdp", insecure_seed=1)
    engine, model, optimizer, loader = familiar(mlp(), dataset(), clipping="diff2", engine=engine)
    criterion = nn.functional.cross_entropy
    for epoch in range(2):
        for x, y in loader:
            if epoch == 1:
                with pytest.raises(RuntimeError, match=r"as a function.*call evaluate\(lambda: losses"):
                    criterion(model(x), y).backward()
                assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
                engine.evaluate(lambda x=x, y=y: criterion(model(x), y, reduction="none"))
            else:
                criterion(model(x), y).backward()
            optimizer.step()
    engine.detach()


@pytest.mark.parametrize("records", [None, (0, 1, 2), (0, 0, 1, 2, 3, 4, 5, 6)], ids=["none", "few", "twice"])
def test_a_memory_must_know_its_records(records):
    model = mlp()
    with opened(model, "clip21") as private:
        for batch in private.batches(vectors(N), steps=1):
            with pytest.raises(ValueError, match=r"pass records=part.indices|one twice; pass the indices"):
                private.accumulate(losses_of(model, batch.examples), records=records)
            collect(private, model, losses_of, batch)
            private.release()


def test_a_memory_refuses_records_that_were_not_drawn_or_came_before():
    model = mlp()
    with opened(model, "clip21", rate=0.5) as private:
        for batch in private.batches(vectors(N), steps=1):
            others = [i for i in range(N) if i not in batch.indices]
            assert len(batch.indices) >= 2 and others
            with pytest.raises(ValueError, match="got one that was not drawn"):
                private.accumulate(losses_of(model, batch.examples[:1]), records=others[:1])
            private.accumulate(losses_of(model, batch.examples[:1]), records=batch.indices[:1])
            with pytest.raises(ValueError, match="or one twice"):
                private.accumulate(losses_of(model, batch.examples[1:2]), records=batch.indices[:1])
            private.accumulate(losses_of(model, batch.examples[1:]), records=batch.indices[1:])
            private.release()


def test_a_memory_refuses_padding_and_goes_on():
    model = mlp()
    with opened(model, "clip21") as private:
        for batch in private.batches(vectors(N), steps=1):
            with pytest.raises(ValueError, match="no padding"):
                private.accumulate(
                    losses_of(model, batch.examples), keep=[True] * (N - 1) + [False], records=batch.indices
                )
            private.discard()
            collect(private, model, losses_of, batch)
            private.release()


def test_a_memory_refuses_merged_backwards():
    model = mlp()
    with opened(model, "clip21") as private:
        for batch in private.batches(vectors(N), steps=1):
            with pytest.raises(ValueError, match="rows without records"), private.same_examples():
                private.accumulate(losses_of(model, batch.examples))
            private.discard()
            collect(private, model, losses_of, batch)
            private.release()


def test_a_memory_that_is_too_small_is_refused():
    model = mlp()
    with opened(model, Clip21(C, N - 1, 1.0)) as private:
        with pytest.raises(ValueError, match=f"the one dataset of {N - 1} records .* got another one"):
            next(private.batches(vectors(N), steps=1))
        draw = private.draw(N)
        private.begin(draw.number, len(draw.indices), draw.indices)
        with pytest.raises(ValueError, match=f"records from 0 to {N - 2}"):
            private.accumulate(losses_of(model, vectors(N)), records=draw.indices)
        private.release()


def test_a_plain_backward_without_records_is_refused_in_the_familiar_door():
    engine = PrivacyEngine(accountant="rdp", insecure_seed=1)
    engine, model, optimizer, loader = familiar(mlp(), dataset(), clipping="clip21", engine=engine)
    for x, y in loader:
        with pytest.raises((ValueError, RuntimeError), match="records"):
            nn.functional.cross_entropy(model(x), y).backward()
        engine.discard()
        engine.evaluate(
            lambda x=x, y=y: nn.functional.cross_entropy(model(x), y, reduction="none"), records=range(N)
        )
        optimizer.step()
    engine.detach()


def test_a_backward_past_the_explicit_door_is_refused_where_records_count():
    model = mlp()
    with opened(model, "clip21") as private:
        for batch in private.batches(vectors(N), steps=1):
            with pytest.raises((ValueError, RuntimeError), match="records"):
                losses_of(model, batch.examples).sum().backward()
            private.discard()
            private.release()


# -- samplers, mechanisms, numbers ---------------------------------------------------------------------------------


def train(estimator, sampling, **options):
    return PrivateTraining(
        mlp(),
        estimator=estimator,
        mechanism=options.pop("mechanism", GaussianMechanism(1.0)),
        sampling=sampling,
        accountant_name="rdp",
        **options,
    )


EPOCHS = sized("balls-in-bins", num_records=N, batch_size=2)


@pytest.mark.parametrize(
    ("estimator", "sampling", "match"),
    [
        (
            Dice(C, 0.1),
            EPOCHS,
            "expected Poisson sampling and Gaussian noise for hidden feedback; got BallsInBins",
        ),
        (Dice(C, 0.1), TruncatedPoissonSampling(0.5, 7, N, 4.0), "got TruncatedPoissonSampling"),
        (Clip21(C, N, 0.25), EPOCHS, "expected Poisson sampling at the estimator's rate 0.25"),
        (Clip21(C, N, 0.25), PoissonSampling(0.5, 4.0), "expected Poisson sampling at the estimator's rate"),
        (Scheduled(C, 5, noise_end=0.5), EPOCHS, "a sampler that draws each step anew.*use Poisson sampling"),
        (Difference(C, dict, ratio=2.0), EPOCHS, "a sampler that draws each step anew.*use Poisson sampling"),
    ],
)
def test_samplers_under_which_nothing_is_proven_are_refused(estimator, sampling, match):
    with pytest.raises(ValueError, match=match):
        train(estimator, sampling)


def test_under_replacement_hidden_feedback_and_memories_cost_more():
    sampling = PoissonSampling(0.25, 2.0)
    for made in (lambda: Dice(C, 0.1), lambda: Clip21(C, N, 0.25)):
        costs = []
        for relation in ("add-or-remove-one", "replace-one"):
            with train(made(), sampling, relation=relation) as private:
                for batch in private.batches(vectors(N), steps=2):
                    collect(private, private.model, losses_of, batch)
                    private.release()
                costs.append(private.epsilon(1e-5))
        assert costs[0] < costs[1]
    with pytest.raises(ValueError, match="expected Poisson sampling and Gaussian noise"):
        train(Dice(C, 0.1), FixedSizeSampling(2, N), relation="replace-one")


def test_a_clip_norm_that_moves_alone_goes_with_epochs():
    train(Scheduled(C, 5, clip_end=0.5), EPOCHS)


@pytest.mark.parametrize(
    ("estimator", "mechanism"),
    [
        (TwoThreshold(C, 1.0), GroupGaussianMechanism(1.0)),
        (Quantile(C), GroupGaussianMechanism(1.0)),
        (Quantile(C), GridGaussianMechanism(GaussianMechanism(1.0))),
        (Scheduled(C, 5, noise_end=0.5), GridGaussianMechanism(GaussianMechanism(1.0))),
    ],
)
def test_a_mechanism_that_cannot_share_its_noise_is_refused(estimator, mechanism):
    if isinstance(
        estimator, Scheduled
    ):  # its first step has the noise as given: the second must not come as a surprise
        with (
            pytest.raises(ValueError, match="where the noise varies"),
            train(estimator, PoissonSampling(0.5, 4.0), mechanism=mechanism) as private,
        ):
            for _ in private.batches([], steps=2):
                private.release()
        return
    with pytest.raises(ValueError, match="expected a GaussianMechanism with an estimator"):
        train(estimator, PoissonSampling(0.5, 4.0), mechanism=mechanism)


def test_rounds_refuse_noise_that_cannot_be_shared_before_anything_is_charged():
    charged = 0
    with (
        pytest.raises(ValueError, match="where the noise varies"),
        train(
            Centred(C, rounds=2),
            PoissonSampling(0.5, 4.0),
            mechanism=GridGaussianMechanism(GaussianMechanism(1.0)),
        ) as private,
    ):
        for _ in private.batches([], steps=1):
            try:
                private.release()
            finally:
                charged = private.ledger.num_charges
    assert charged == 0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("medain", "expected an estimator out of flat, .*; got 'medain'"),
        ("Flat", "expected an estimator out of"),
        ("", "expected an estimator out of"),
        ("flat:rate=2", "expected an estimator out of"),
        ("median:", "expected median with numbers out of rate"),
        ("median:speed=1", "expected median with numbers out of rate, as in median:rate=2; got 'speed=1'"),
        ("median:rate", "got 'rate'"),
        ("median:rate=", "got 'rate='"),
        ("median:rate=0.1,rate=0.2", "got 'rate=0.2'"),
        ("median:rate=fast", "expected a number for rate; got 'fast'; write rate=2"),
        ("diff2:restart=1.5", "expected a whole number for restart; got '1.5'"),
        ("schedule", "expected schedule:steps=...; got 'schedule'"),
        ("per_layer:huber", "expected an estimator out of"),
    ],
)
def test_names_that_say_nothing_are_refused(text, match):
    with pytest.raises(ValueError, match=match):
        check_estimator(text)
    with pytest.raises(ValueError, match=match):
        named(text, mlp())
    with pytest.raises(ValueError, match=match):
        familiar(mlp(), dataset(), clipping=text)


BAD = (float("nan"), float("inf"), 0.0, -1.0)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    "make",
    [
        Centred,
        lambda x: Centred(C, rate=x),
        lambda x: TwoThreshold(x, 1.0),
        lambda x: TwoThreshold(C, x),
        lambda x: TwoThreshold(C, 1.0, x),
        Quantile,
        lambda x: Quantile(C, x),
        lambda x: Quantile(C, rate=x),
        lambda x: Quantile(C, share=x),
        Slack,
        lambda x: Slack(C, edges=(x,)),
        lambda x: Clip21(x, N, 0.5),
        lambda x: Clip21(C, N, x),
        lambda x: Clip21(C, N, 0.5, x),
        lambda x: Dice(x, 0.1),
        lambda x: Dice(C, x),
        lambda x: Dice(C, 0.1, x),
        lambda x: Difference(x, dict),
        lambda x: Difference(C, dict, x),
        lambda x: Difference(C, dict, ratio=x),
        lambda x: Difference(C, dict, shortest=x),
        lambda x: Scheduled(x, 5),
        lambda x: Scheduled(C, 5, x),
        lambda x: Scheduled(C, 5, noise_end=x),
    ],
)
def test_numbers_that_mean_nothing_are_refused(make, bad):
    with pytest.raises(ValueError, match=r"expected .*; got .*; "):
        make(bad)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Centred(C, rounds=0),
        lambda: Centred(C, coordinates=0),
        lambda: Clip21(C, 0, 0.5),
        lambda: Clip21(C, N, 0.5, restart=0),
        lambda: Difference(C, dict, restart=0),
        lambda: Scheduled(C, 0),
        lambda: Slack(C, edges=()),
        lambda: Slack(C, edges=(0.7, 0.4)),
        lambda: Slack(C, edges=(0.4, 1.0)),
        lambda: Dice(C, 0.1, bound=C),
        lambda: Quantile(C, share=1.0),
        lambda: Quantile(C, most=float("nan")),
        lambda: Slack(C, most=0.0),
    ],
)
def test_counts_that_mean_nothing_are_refused(make):
    with pytest.raises(ValueError, match=r"expected .*; got .*; "):
        make()
