# SPDX-License-Identifier: Apache-2.0
"""What cannot be recorded is refused: the text says what was expected, what came and what to do."""

import copy
import io
import re
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from clipping import (
    FlatClipper,
    Inputs,
    MixesExamples,
    Tape,
    UnrecordedParameter,
    examine,
    probe,
    refuse_mixed,
    rule,
)
from clipping.gradients.dense import Dense
from tests.support.clipping.subjects import (
    SUBJECTS,
    Recorder,
    V,
    clipped_by_hand,
    example_gradients,
    input_ids,
    mlp,
    squares,
)

B, D = 4, 8


def recorded(model, **arguments):
    return Recorder(model, FlatClipper(1.0), **arguments)


def untouched(model):
    return all(p.grad is None for p in model.parameters())


# -- no gradient reaches p.grad ---------------------------------------------------------------------------------


def functional(model, x):
    return torch.func.functional_call(model, dict(model.named_parameters()), (x,))


def direct_use(model, x):
    return model[0](x) @ model[2].weight.T


def penalty(model, x):
    return model(x) + sum(p.square().sum() for p in model.parameters())


def unused(idle):
    raise AssertionError("no backward was expected")


@pytest.mark.parametrize("use", [direct_use, penalty])
def test_guarantee_autograd_never_writes_a_gradient(use):
    model = mlp()
    with recorded(model) as recorder:
        with pytest.raises(
            UnrecordedParameter,
            match=r"expected parameter '.*' to be used only inside the forward of the module that owns it; got a "
            r"gradient by another way .*; call the owning module, or freeze the parameter",
        ):
            squares(use(model, torch.randn(B, D))).sum().backward()
        assert untouched(model) and recorder.sizes == []
        squares(model(torch.randn(B, D))).sum().backward()
    assert untouched(model) and recorder.sizes == [B]


def test_guarantee_autograd_never_writes_a_gradient_past_a_child():
    model, x = mlp(), torch.randn(B, D)
    with recorded(model) as recorder, pytest.raises(UnrecordedParameter, match=r"'0.weight'"):
        (model(x).sum() + (x @ model[0].weight.T).sum()).backward()
    assert untouched(model) and recorder.sizes == []


def test_functional_call_of_the_model_itself():
    model = mlp()
    with recorded(model) as recorder:
        squares(functional(model, torch.randn(B, D))).sum().backward()
    assert untouched(model) and recorder.sizes == [B]


def test_patched_forward_falls_to_the_generic_rule():
    model = nn.Sequential(nn.Linear(D, D).double(), nn.Linear(D, 2).double())
    plain = model[0].forward
    model[0].forward = lambda x: 3 * plain(x)
    x = torch.randn(B, D, dtype=torch.float64)
    clipper = FlatClipper(1e6)
    with Recorder(model, clipper) as recorder:
        squares(model(x)).sum().backward()
    expected = clipped_by_hand(example_gradients(SUBJECTS["mlp"], model, (x,), B), clipper)
    for name, value in recorder.total().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


def test_thawing_after_attaching_is_refused():
    model = mlp()
    model[0].requires_grad_(False)
    with recorded(model):
        model[0].requires_grad_(True)
        with pytest.raises(
            UnrecordedParameter, match=r"got \['0.weight', '0.bias'\] trainable, .*unfreeze them"
        ):
            model(torch.randn(B, D))
    assert untouched(model)


def test_second_order_backward_is_refused():
    model, x = mlp(), torch.randn(B, D, requires_grad=True)
    with recorded(model) as recorder:
        losses = squares(model(x))
        with pytest.raises(
            RuntimeError, match=r"backward of first order; got create_graph=True, .*drop create_graph"
        ):
            torch.autograd.grad(losses.sum(), x, create_graph=True)
    assert recorder.sizes == [] and untouched(model)


def test_a_second_backward_of_a_retained_graph_is_refused():
    model = mlp()
    with recorded(model) as recorder:
        losses = squares(model(torch.randn(B, D)))
        losses.sum().backward(retain_graph=True)
        with pytest.raises(
            RuntimeError, match=r"one backward through each forward of the model; got a second"
        ):
            losses.sum().backward()
    assert recorder.sizes == [B]


# -- checkpointing ----------------------------------------------------------------------------------------------


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return checkpoint(self.second, torch.tanh(self.first(x)), use_reentrant=True)


def test_reentrant_checkpointing_is_refused():
    model = Reentrant()
    with recorded(model) as recorder:
        with pytest.raises(
            RuntimeError,
            match=r"expected layer 'second' to run before the backward; got reentrant gradient checkpointing, .*"
            r"use_reentrant=False",
        ):
            model(torch.randn(B, D)).sum().backward()
    assert untouched(model) and recorder.sizes == []


# -- refused by list --------------------------------------------------------------------------------------------


def half():
    return nn.Linear(D, 2).half()


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: nn.BatchNorm1d(D), r"'1' \(BatchNorm1d\): it normalises each example by the whole batch; use GroupNorm"),
        (lambda: nn.SyncBatchNorm(D), r"'1' \(SyncBatchNorm\): .*dpopt.ModuleValidator.fix"),
        (lambda: nn.BatchNorm2d(D, affine=False), "it normalises each example by the whole batch"),
        (lambda: nn.BatchNorm1d(D, track_running_stats=False).eval(), "it normalises each example by the whole batch"),
        (
            lambda: nn.InstanceNorm1d(D, track_running_stats=True),
            "running statistics are un-noised averages over private examples; track_running_stats=False",
        ),
        (half, "its parameter 'weight' is float16, whose loss scaling looks at un-noised gradients; keep the parameters"),
        (lambda: nn.LazyLinear(2), "no parameters before its first call; run the model once before making it private"),
    ],
)  # fmt: skip
def test_refused_by_list(build, text):
    model = nn.Sequential(nn.Linear(D, D), build())
    with pytest.raises(MixesExamples, match=r"whose modules treat each example alone; got .*" + text):
        examine(model)


def test_the_list_names_every_module():
    model = nn.Sequential(nn.Linear(D, D), *[nn.BatchNorm1d(D) for _ in range(6)])
    with pytest.raises(MixesExamples, match=r"'1' \(.*'2' \(.*'3' \(.*'4' \(.*; and 2 more"):
        examine(model)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.BatchNorm1d(D).eval(),
        lambda: nn.InstanceNorm1d(D),
        lambda: nn.LSTM(D, D),
        lambda: nn.GRU(D, D).requires_grad_(False),
        lambda: nn.GroupNorm(2, D),
        lambda: nn.Linear(D, D).bfloat16(),
        lambda: nn.Linear(D, D).half().requires_grad_(False),
    ],
)
def test_what_keeps_examples_apart_passes_the_list(build):
    examine(nn.Sequential(nn.Linear(D, D), build()))


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(
        ValueError, match=r"expected a model with trainable parameters; got none.*; unfreeze some"
    ):
        examine(mlp().requires_grad_(False))


# -- refused by the probe ---------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """A linear layer on either side of something that is a function of the whole batch."""

    def __init__(self, mix):
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.mix = mix

    def forward(self, x):
        return self.second(self.mix(torch.tanh(self.first(x))))


MIXERS = {
    "mean": lambda h: h - h.mean(0),
    "cumulative sum": lambda h: h.cumsum(0),
    "reversed cumulative sum": lambda h: h.flip(0).cumsum(0).flip(0),
    "roll": lambda h: h.roll(1, 0),
    "attention": lambda h: torch.softmax(h @ h.T, -1) @ h,
    "shuffled": lambda h: h.flip(0),
    "largest": lambda h: h / h.abs().max(),
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("size", [2, 5])
def test_the_probe_refuses_what_mixes_examples(name, size):
    model = Mixer(MIXERS[name])
    with pytest.raises(
        MixesExamples,
        match=r"expected the output or loss of one example to depend on that example alone; got rows of 'first' that reach "
        r"another example's, or several; look for BatchNorm-like statistics",
    ):
        examine(model, Inputs((torch.randn(size, D),), {}))


DETACHED = {
    "detached mean": lambda h: h - h.mean(0).detach(),
    "detached reversed sum": lambda h: h + h.flip(0).cumsum(0).flip(0).detach(),
    "one place for the whole batch": lambda h: h * (h.sum(1) == h.sum(1).max()).unsqueeze(1),
}


@pytest.mark.parametrize("name", DETACHED)
def test_the_probe_refuses_an_influence_that_sends_back_no_gradient(name):
    with pytest.raises(MixesExamples, match=r"got another output beside other examples; look for statistics"):
        examine(Mixer(DETACHED[name]), Inputs((torch.randn(4, D),), {}))


def test_the_probe_accepts_dropout():
    examine(Mixer(nn.Dropout(0.5)), Inputs((torch.randn(4, D),), {}))


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_the_probe_accepts_what_keeps_examples_apart(name):
    subject = SUBJECTS[name]
    if subject.call is not None:
        pytest.skip("the model is not called as a whole")
    model = subject.build().double()
    inputs = subject.inputs(3)
    made = Inputs((), inputs) if isinstance(inputs, dict) else Inputs(inputs, {})
    examine(model, made, batch_dim=subject.batch_dim)
    assert untouched(model)


class Growing(nn.Module):
    """Buffers that a forward changes, replaces and creates."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("none", None)

    def forward(self, x):
        self.calls += 1
        self.last = x.detach()
        self.register_buffer("made", x.detach(), persistent=False)
        return nn.functional.dropout(self.linear(x), 0.5)


def test_the_probe_leaves_buffers_random_state_gradients_and_hooks_alone():
    model = Growing()
    model.linear.weight.grad = torch.ones(D, D)
    buffers, state = dict(model.named_buffers()), torch.get_rng_state()
    probe(model, Inputs((torch.randn(2, D),), {}))
    torch.manual_seed(0)
    torch.set_rng_state(state)
    x = torch.randn(2, D)
    state = torch.get_rng_state()
    probe(model, Inputs((x,), {}))
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(model.named_buffers()).keys() == buffers.keys()
    assert model.calls == 0 and model.last is buffers["last"] and "made" not in model._buffers
    assert torch.equal(model.linear.weight.grad, torch.ones(D, D)) and model.linear.bias.grad is None
    assert not model._forward_pre_hooks and not model.linear._forward_hooks


def test_the_probe_restores_after_a_refusal():
    model = Mixer(MIXERS["mean"])
    with pytest.raises(MixesExamples):
        probe(model, Inputs((torch.randn(3, D),), {}))
    assert (
        untouched(model) and not model.first._forward_hooks and isinstance(model.first.weight, nn.Parameter)
    )


def test_one_example_proves_nothing_and_passes():
    probe(Mixer(MIXERS["mean"]), Inputs((torch.randn(1, D),), {}))


def test_refuse_mixed_counts_rows_that_are_not_examples():
    refuse_mixed({"w": Dense(torch.tensor([[0.0], [1.0]]))}, 1, "loss")
    with pytest.raises(MixesExamples, match="expected the loss of one example"):
        refuse_mixed({"w": Dense(torch.tensor([[1.0], [1.0]]))}, 1, "loss")
    with pytest.raises(MixesExamples):
        refuse_mixed({"w": Dense(torch.tensor([[1.0]]))}, 3, "loss")


# -- the generic rule -------------------------------------------------------------------------------------------


class Generic(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))
        self.mix = mix

    def forward(self, x):
        return self.mix(x * self.weight)


GENERIC_MIXERS = {
    **MIXERS,
    "detached mean": lambda h: h - h.mean(0).detach(),
    "batch loss": lambda h: h.mean(),
}


@pytest.mark.parametrize("name", GENERIC_MIXERS)
def test_generic_modules_that_mix_examples_are_refused_when_they_run(name):
    model = nn.Sequential(nn.Linear(D, D), Generic(GENERIC_MIXERS[name]))
    with (
        recorded(model),
        pytest.raises(
            MixesExamples,
            match=r"expected module '1' \(Generic\), which has no rule of its own, to give each example the output it "
            r"gives that example alone; .*take nothing from the whole batch .*, or give the module a rule",
        ),
    ):
        model(torch.randn(B, D))
    assert isinstance(model[1].weight, nn.Parameter) and untouched(model)


def test_a_bad_example_does_not_hide_a_mixing_module():
    model = nn.Sequential(nn.Linear(D, D), Generic(MIXERS["mean"]))
    x = torch.randn(B, D)
    with recorded(model):
        model(x.index_fill(0, torch.tensor([0]), float("nan")))  # proves nothing
        with pytest.raises(MixesExamples):
            model(x)


def test_opaque_outputs_are_refused():
    class Box:
        def __init__(self, value):
            self.value = value

    model = Generic(Box)
    with (
        recorded(model),
        pytest.raises(TypeError, match=r"'model' to return tensors in tuples, .*; got a Box, .*register"),
    ):
        model(torch.randn(B, D))


def test_an_embedding_that_looks_at_the_batch_is_refused():
    model = nn.Embedding(V, D, scale_grad_by_freq=True)
    with (
        recorded(model),
        pytest.raises(ValueError, match="without max_norm and scale_grad_by_freq, which depend"),
    ):
        model(torch.randint(0, V, (B, 3))).sum().backward()
    assert untouched(model)


def test_a_registered_rule_serves_a_class():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D, dtype=torch.float64))

        def forward(self, x):
            return x * self.weight

    @rule(Scale, parameters=("weight",))
    def scale(layer, inputs, grad):
        return {"weight": Dense(grad * inputs.first)}

    model, x, clipper = Scale(), torch.randn(B, D, dtype=torch.float64), FlatClipper(1e6)
    with Recorder(model, clipper) as recorder:
        assert recorder.tape.layers[0].rule is not None
        squares(model(x)).sum().backward()
    expected = clipped_by_hand(example_gradients(SUBJECTS["mlp"], model, (x,), B), clipper)
    torch.testing.assert_close(recorder.total()["weight"], expected["weight"])


# -- the batch dimension ----------------------------------------------------------------------------------------


class FlatPositions(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.embed, self.position = nn.Embedding(V, D), nn.Embedding(9, D)
        self.table = table

    def forward(self, x):
        return self.embed(x) + self.position(self.table(x))


@pytest.mark.parametrize("size", [B, 6])  # also when the sequence is as long as the batch
def test_position_indices_of_one_dimension_are_refused_where_nothing_tells_what_made_them(size):
    model = FlatPositions(lambda x: torch.arange(x.shape[1]))
    x = torch.randint(0, V, (B, size))
    text = r"the batch in dimension 0 for embedding 'position', called outside .*; got shape \(\d,\), .*call the model itself"
    with recorded(model), pytest.raises(ValueError, match=text):
        model.forward(x)  # the model's own hook does not run
    assert isinstance(model.position.weight, nn.Parameter)


class Loop(nn.Module):
    """Sends its examples through a layer one by one."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x):
        return self.head(torch.cat([self.linear(row.unsqueeze(0)) for row in x]))


def test_examples_sent_one_by_one_are_refused_where_no_losses_tell_whose_they_are():
    model = Loop()
    with recorded(model) as recorder:
        with pytest.raises(ValueError, match=r"one row for each example at 'linear', .*give the losses"):
            squares(model(torch.randn(B, D))).sum().backward()
    assert untouched(model) and recorder.sizes == []


def test_a_batch_of_one_outside_the_models_forward_stays_a_batch_of_one():
    model = SUBJECTS["positions of shape (1, T)"].build()
    with recorded(model) as recorder:
        model(torch.randint(0, V, (B, 5)))
        assert model.embed(torch.randint(0, V, (1, 5))).shape == (1, 5, D)
        model(torch.randint(0, V, (B, 5))).sum().backward()
    assert recorder.sizes == [B]


def test_indices_of_one_dimension_are_examples_where_the_model_takes_them():
    model = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, 2))
    with recorded(model) as recorder:
        model(torch.randint(0, V, (B,))).sum().backward()
    assert recorder.sizes == [B]


class Folded(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x):
        return self.head(self.inner(x.flatten(0, 1)).view_as(x).mean(1))


def test_batches_folded_with_positions_are_refused_where_no_losses_tell_whose_the_rows_are():
    model = Folded()
    with recorded(model) as recorder:
        with pytest.raises(
            ValueError,
            match=r"one row for each example at 'inner', .*; got 3 rows for each; give the losses of the examples, .*keep "
            r"the examples in the first dimension, \(B, K, ...\), or call the layer once for each",
        ):
            model(torch.randn(B, 3, D)).sum().backward()
        assert untouched(model) and recorder.sizes == []


# -- failures leave nothing behind ------------------------------------------------------------------------------


class Fails(nn.Module):
    """Fails when told to: in its own forward, or from inside the backward."""

    def __init__(self, error=RuntimeError):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.error = error
        self.armed = False

    def forward(self, x):
        if self.armed:
            raise self.error("by design")
        return x * self.weight


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raises_puts_the_parameters_back(error):
    model = nn.Sequential(nn.Linear(D, D), Fails(error), nn.Linear(D, 2))
    owned = dict(model.named_parameters())
    recorder = recorded(model)
    with recorder:
        model[1].armed = True
        with pytest.raises(error, match="by design"):
            model(torch.randn(B, D))
        if error is RuntimeError:
            assert dict(model.named_parameters())["1.weight"] is owned["1.weight"]
        model[1].armed = False
        squares(model(torch.randn(B, D))).sum().backward()
        assert recorder.sizes == [B] and set(recorder.sums.totals) == set(owned)
        model[1].armed = True
        with pytest.raises(error):
            model(torch.randn(B, D))
    assert all(p is owned[n] for n, p in model.named_parameters()) and untouched(model)


def test_a_hook_that_raises_puts_the_parameters_back():
    model = mlp()
    with recorded(model):

        def refuse(*_):
            raise RuntimeError("by design")

        for register in (model[0].register_forward_pre_hook, model[0].register_forward_hook):
            handle = register(refuse)
            with pytest.raises(RuntimeError, match="by design"):
                model(torch.randn(B, D))
            handle.remove()
            assert isinstance(model[0].weight, nn.Parameter)


class Bomb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, armed):
        ctx.armed = armed
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.armed:
            raise RuntimeError("by design")
        return grad, None


def test_a_backward_that_raises_leaves_no_partial_record():
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 2))
    x = torch.randn(B, D)

    def run(armed):
        squares(model[1](Bomb.apply(model[0](x), armed))).sum().backward()

    with recorded(model) as alone:
        run(False)
    with recorded(model) as recorder:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="by design"):
                run(True)
        assert recorder.sizes == [] and not recorder.tape.deliveries._records
        run(False)
    assert recorder.sizes == [B] and untouched(model)
    for name, value in alone.total().items():
        torch.testing.assert_close(recorder.total()[name], value)


def test_a_backward_inside_another_is_a_record_of_its_own():
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 2))
    with recorded(model) as recorder:
        inner = squares(model(torch.randn(3, D))).sum()
        hidden = model[0](torch.randn(B, D))
        hidden.register_hook(lambda _: inner.backward())
        squares(model[1](hidden)).sum().backward()
    assert recorder.sizes == [3, B] and untouched(model)


def test_inputs_changed_after_the_call_are_refused():
    model, x = mlp(), torch.randn(B, D)
    with recorded(model) as recorder:
        losses = squares(model(x))
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses.sum().backward()
    assert recorder.sizes == [] and untouched(model)


def test_nested_and_repeated_use():
    model = mlp()
    recorder = recorded(model)
    with recorder:
        with pytest.raises(
            RuntimeError, match="expected a detached tape; got one already attached; detach it first"
        ):
            recorder.tape.attach()
        for other in (model, model[0], nn.ModuleList([model])):
            with pytest.raises(
                RuntimeError, match=r"a model that no tape records; got parameter .*detach that tape"
            ):
                Tape(other, unused).attach()
        with pytest.raises(RuntimeError, match="a model that no tape records"):
            probe(model, Inputs((torch.randn(2, D),), {}))
        squares(model(torch.randn(B, D))).sum().backward()
    with recorder:  # a detached tape can be attached again
        squares(model(torch.randn(B, D))).sum().backward()
    assert recorder.sizes == [B, B]
    with Tape(model, unused):
        pass


def test_a_copy_of_an_attached_model_is_an_ordinary_model():
    model, x = mlp(), torch.randn(B, D)
    with recorded(model) as recorder:
        copied = copy.deepcopy(model)
        squares(copied(torch.randn(3, D))).sum().backward()
        assert recorder.sizes == [] and all(p.grad is not None for p in copied.parameters())
        copied.zero_grad()
        with recorded(copied) as other:
            squares(copied(x)).sum().backward()
        assert other.sizes == [B] and untouched(copied)
        squares(model(x)).sum().backward()
        assert recorder.sizes == [B] and untouched(model)
        with pytest.raises(TypeError, match=r"expected a detached model to pickle; .*save model.state_dict"):
            torch.save(model, io.BytesIO())
        torch.save(model.state_dict(), io.BytesIO())


def test_forward_calls_of_two_threads_are_refused():
    model = nn.Sequential(nn.Linear(D, D), Fails())
    inside, leave, errors = threading.Event(), threading.Event(), []

    def wait(x):
        inside.set()
        leave.wait(10)
        return x * model[1].weight

    model[1].forward = wait
    with recorded(model) as recorder:
        thread = threading.Thread(target=lambda: model(torch.randn(B, D)))
        thread.start()
        inside.wait(10)
        with pytest.raises(
            RuntimeError, match="one forward call at a time on a recorded model; got calls from two"
        ):
            model[0](torch.randn(B, D))
        leave.set()
        thread.join()
        assert isinstance(model[1].weight, nn.Parameter) and not errors
        squares(model[0](torch.randn(B, D))).sum().backward()
    assert recorder.sizes == [B]


# Both warnings are torch.compile's own.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_models_are_recorded():
    torch.compiler.reset()
    model, x = mlp(), torch.randn(B, D)
    compiled = torch.compile(model, backend="eager")
    with recorded(model) as plain:
        squares(model(x)).sum().backward()
    with recorded(model) as recorder:
        squares(compiled(x)).sum().backward()
    assert recorder.sizes == [B] and untouched(model)
    for name, value in plain.total().items():
        torch.testing.assert_close(recorder.total()[name], value)
    torch.compiler.reset()


def test_complex_parameters_are_refused():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, 2, dtype=torch.complex64)

        def forward(self, x):
            return self.linear(torch.complex(x, x)).abs()

    model = Spectrum()
    with recorded(model), pytest.raises(TypeError, match=re.escape("got torch.complex64")):
        model(torch.randn(B, D)).sum().backward()
    assert untouched(model)


def test_complex_outputs_of_a_real_parameter():
    model = nn.Sequential(Generic(torch.fft.rfft), Real()).double()
    x, clipper = torch.randn(B, D, dtype=torch.float64), FlatClipper(1e6)
    with Recorder(model, clipper) as recorder:
        squares(model(x)).sum().backward()
    expected = clipped_by_hand(example_gradients(SUBJECTS["mlp"], model, (x,), B), clipper)
    torch.testing.assert_close(recorder.total()["0.weight"], expected["0.weight"], rtol=1e-9, atol=1e-9)


class Real(nn.Module):
    def forward(self, x):
        return torch.fft.irfft(x * (1 + 2j))


def test_no_examples_and_no_recorded_layer():
    model = mlp()
    with recorded(model) as recorder:
        squares(model(torch.randn(0, D))).sum().backward()
        (torch.randn(3, requires_grad=True) * 2).sum().backward()  # a backward that reaches no layer
    assert recorder.sizes == [0]
    assert all((value == 0).all() for value in recorder.total().values())


def test_transformers_models_take_their_inputs_by_keyword():
    model = SUBJECTS["GPT-2"].build()
    examine(model, Inputs((), input_ids(2)))
