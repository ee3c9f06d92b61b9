# SPDX-License-Identifier: Apache-2.0
"""The tape beside other machinery of PyTorch: checkpoints, offloading, compilers, mixed precision, shared weights."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from clipping import FlatClipper
from tests.support.clipping.subjects import (
    SUBJECTS,
    D,
    Recorder,
    Subject,
    T,
    V,
    checkpointed_gpt2,
    clipped_by_hand,
    clippers,
    example_gradients,
    gpt2,
    ids,
    input_ids,
    lora,
    mlp,
    real,
    squares,
    tokens_loss,
)

B = 4


class Nested(nn.Module):
    """A checkpoint around checkpoints, with a generic module inside."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(D, D), nn.Linear(D, D), Scale()

    def inner(self, x):
        return torch.tanh(checkpoint(self.scale, self.first(x), use_reentrant=False))

    def outer(self, x):
        return self.second(checkpoint(self.inner, x, use_reentrant=False))

    def forward(self, x):
        return checkpoint(self.outer, x, use_reentrant=False) + self.first(x)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x):
        return x * self.weight


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*[nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(4)])

    def forward(self, x):
        return checkpoint_sequential(self.body, 2, x, use_reentrant=False)


def offloaded(model, x):
    with torch.autograd.graph.save_on_cpu():
        return model(x)


def packed(model, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.clone(),), lambda held: held[0]):
        return model(x)


class Attention(nn.Module):
    """Fused attention between linear layers; the mask stands for every example."""

    def __init__(self, causal):
        super().__init__()
        self.embed, self.position = nn.Embedding(V, D), nn.Embedding(T, D)
        self.packed, self.out = nn.Linear(D, 3 * D), nn.Linear(D, 3)
        self.causal = causal

    def forward(self, x):
        at = torch.arange(x.shape[1]).unsqueeze(0)
        h = self.embed(x) + self.position(at)
        q, k, v = self.packed(h).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
        mask = None if self.causal else torch.ones(T, T, dtype=torch.bool).tril(1)
        return self.out(
            F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal).transpose(1, 2).flatten(2)
        )


class Shared(nn.Module):
    """One weight in two linear layers, in an embedding, and transposed in a module of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.turned = Turned(self.a)
        self.b.weight = self.embed.weight = self.a.weight

    def forward(self, x):
        h = torch.tanh(self.a(self.embed(x % D)))
        return self.turned(torch.tanh(self.b(h)) + self.a(h))


class Turned(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x):
        return x @ self.weight


class Frozen(nn.Module):
    """Frozen embedding, norm and half of a layer between trainable ones."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(V, D), nn.LayerNorm(D)
        self.mix, self.head = nn.Linear(D, D), nn.Linear(D, 3)
        for frozen in (self.embed, self.norm, self.mix.weight):
            frozen.requires_grad_(False)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.mix(self.embed(x)))))


def repeated(model, x):
    for _ in range(3):
        x = torch.tanh(model(x))
    return x


COMPOSED = {
    "nested checkpoints": Subject(Nested, real(T, D)),
    "checkpoint_sequential": Subject(Sequence, real(D)),
    "offloaded": Subject(mlp, real(T, D), call=offloaded),
    "offloaded checkpoints": Subject(Nested, real(T, D), call=offloaded),
    "packed tensors": Subject(SUBJECTS["layer used twice"].build, ids, call=packed),
    "fused attention, causal": Subject(lambda: Attention(True), ids),
    "fused attention, mask": Subject(lambda: Attention(False), ids),
    "one weight in four modules": Subject(Shared, ids),
    "frozen embedding and norm": Subject(Frozen, ids),
    "repeated model": Subject(lambda: nn.Linear(D, D), real(D), call=repeated),
}


def checked(subject, model, inputs, call=None, *, two_pass=False):
    """The clipped sums of all clippers against the loop of autograd; `call` stands for the model under the tape."""
    num = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0])
    gradients = example_gradients(subject, model, inputs, num)
    norms = sorted(sum(float(v.square().sum()) for v in g.values()) ** 0.5 for g in gradients)
    for kind, clipper in clippers(model, norms[num // 2]).items():
        with Recorder(model, clipper, batch_dim=subject.batch_dim, two_pass=two_pass) as recorder:
            recorder.backward(subject.run(model if call is None else call, inputs).sum())
        assert recorder.sizes == [num]
        for name, value in clipped_by_hand(gradients, clipper).items():
            atol = subject.rtol * max(float(value.abs().max()), 1e-3)
            got = recorder.total()[name]
            torch.testing.assert_close(got, value, rtol=subject.rtol, atol=atol, msg=f"{kind} {name}")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("name", COMPOSED)
def test_compositions_are_clipped_as_by_a_loop_of_autograd(name, two_pass):
    subject = COMPOSED[name]
    for size in (B, 1):
        checked(subject, subject.build().double(), subject.inputs(size), two_pass=two_pass)


@pytest.mark.parametrize("name", COMPOSED)
def test_an_empty_batch_adds_zero(name):
    subject = COMPOSED[name]
    model = subject.build().double()
    for clipper in clippers(model, 1.0).values():
        with Recorder(model, clipper) as recorder:
            subject.run(model, subject.inputs(0)).sum().backward()
        assert recorder.sizes == [0] and not any(x.any() for x in recorder.total().values())


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(D, D), nn.Linear(D, 3), nn.Dropout(0.4)

    def forward(self, x):
        return self.second(self.drop(checkpoint(self.inner, x, use_reentrant=False)))

    def inner(self, x):
        return self.drop(torch.tanh(self.first(x)))


def test_two_backwards_see_the_same_dropout():
    model, x = Dropped().double(), torch.randn(B, D, dtype=torch.float64)
    for clipper in clippers(model, 0.5).values():
        totals = []
        for two_pass in (False, True):
            torch.manual_seed(3)
            with Recorder(model, clipper, two_pass=two_pass) as recorder:
                recorder.backward(squares(model(x)).sum())
            totals.append(recorder.total())
        for name, value in totals[0].items():
            torch.testing.assert_close(totals[1][name], value, rtol=1e-12, atol=1e-12)


class RandomBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.rand_like(grad)


def test_two_backwards_that_differ_are_refused():
    model, x = mlp(), torch.randn(B, D)
    for clipper in clippers(model, 0.5).values():
        with Recorder(model, clipper, two_pass=True) as recorder:
            loss = squares(RandomBackward.apply(model(x))).sum()
            with pytest.raises(RuntimeError, match="expected both backwards to deliver the same gradient"):
                recorder.backward(loss)


def test_reentrant_checkpoints_of_transformers_are_refused():
    model = gpt2()
    with warnings.catch_warnings():  # renamed in transformers 5.23
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for clipper in clippers(model, 1.0).values():
        with Recorder(model, clipper), pytest.raises(RuntimeError, match="use_reentrant=False"):
            tokens_loss(model(**input_ids(B))).sum().backward()
    assert all(p.grad is None for p in model.parameters())


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Sequence().body

    def forward(self, x):
        return checkpoint_sequential(self.body, 2, x, use_reentrant=True)


def test_reentrant_sequences_are_refused():
    model = Reentrant()
    x = torch.randn(B, D, requires_grad=True)
    with Recorder(model, FlatClipper(1.0)), pytest.raises(RuntimeError, match="use_reentrant=False"):
        squares(model(x)).sum().backward()
    assert all(p.grad is None for p in model.parameters())


# -- mixed precision --------------------------------------------------------------------------------------------

MIXED = {
    "mlp": Subject(mlp, real(T, D)),
    "fused attention": Subject(lambda: Attention(True), ids),
    "GPT-2, checkpointed": Subject(checkpointed_gpt2, input_ids, tokens_loss),
    "LoRA": Subject(lora, input_ids, tokens_loss),
    "generic modules": SUBJECTS["generic modules"],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MIXED)
def test_autocast_is_clipped_as_by_a_loop_of_autograd(name, dtype):
    subject = MIXED[name]
    model, inputs = subject.build().float(), subject.inputs(B)
    inputs = (
        inputs
        if isinstance(inputs, dict)
        else tuple(x.float() if x.is_floating_point() else x for x in inputs)
    )
    call = lambda m, *a, **k: under(dtype, m, *a, **k)  # noqa: E731
    subject = Subject(
        subject.build, subject.inputs, lambda out: subject_losses(MIXED[name], out), call=call, rtol=0.05
    )
    gradients = example_gradients(subject, model, inputs, B)
    norms = sorted(sum(float(v.square().sum()) for v in g.values()) ** 0.5 for g in gradients)
    for clipper in clippers(model, norms[B // 2]).values():
        with Recorder(model, clipper) as recorder:
            subject.run(model, inputs).sum().backward()
        expected = clipped_by_hand(gradients, clipper)
        error = sum(float((recorder.total()[n] - v).square().sum()) for n, v in expected.items()) ** 0.5
        assert error < 0.03 * sum(float(v.square().sum()) for v in expected.values()) ** 0.5
        assert {x.dtype for x in recorder.sums.totals.values()} == {torch.float32}


def under(dtype, model, *args, **kwargs):
    with torch.autocast("cpu", dtype):
        return model(*args, **kwargs)


def subject_losses(subject, outputs):
    if hasattr(outputs, "logits"):
        outputs.logits = outputs.logits.float()
        return subject.losses(outputs)
    return subject.losses(
        outputs.float() if isinstance(outputs, torch.Tensor) else tuple(x.float() for x in outputs)
    )


# -- torch.compile ----------------------------------------------------------------------------------------------

# torch.compile's own warnings.
compiling = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def in_place(model, backend):
    model.compile(backend=backend)
    return model


HOW = {"wrapped": lambda m, backend: torch.compile(m, backend=backend), "in place": in_place}
TO_COMPILE = {
    "mlp": SUBJECTS["mlp"],
    "fused attention": COMPOSED["fused attention, causal"],
    "generic modules": SUBJECTS["keywords and raw parameters"],
    "nested checkpoints": COMPOSED["nested checkpoints"],
    "GPT-2": SUBJECTS["GPT-2"],
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def with_marks(function):
    for mark in compiling:
        function = mark(function)
    return function


@with_marks
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [*[*TO_COMPILE][:-1], pytest.param("GPT-2", marks=pytest.mark.slow)])
def test_a_compiled_model_is_clipped_as_by_a_loop_of_autograd(name, how, backend):
    subject = TO_COMPILE[name]
    model = subject.build().double()
    inputs = subject.inputs(B)
    compiled = HOW[how](model, backend)
    subject.run(compiled, inputs).sum().backward()  # code that knows no tape
    model.zero_grad()
    checked(subject, model, inputs, compiled)
    subject.run(compiled, inputs).sum().backward()  # an ordinary model again
    assert any(p.grad is not None for p in model.parameters())


@with_marks
def test_code_compiled_for_another_model_of_the_class_is_not_run():
    subject = TO_COMPILE["fused attention"]
    model, other = subject.build().double(), subject.build().double()
    private, public = torch.compile(model, backend="eager"), torch.compile(other, backend="eager")
    inputs = subject.inputs(B)
    with Recorder(model, FlatClipper(1.0)) as recorder:
        for _ in range(2):
            subject.run(public, inputs).sum().backward()
            subject.run(private, inputs).sum().backward()
    assert recorder.sizes == [B, B] and all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in other.parameters())


@with_marks
def test_a_tape_may_be_attached_to_the_compiled_module_itself():
    subject = SUBJECTS["mlp"]
    model = torch.compile(subject.build().double(), backend="eager")
    checked(subject, model, subject.inputs(B))


@with_marks
def test_a_graph_without_breaks_is_refused_by_the_compiler():
    model = torch.compile(mlp(), backend="eager", fullgraph=True)
    with (
        Recorder(model, FlatClipper(1.0)),
        pytest.raises(Exception, match="private gradients are recorded here"),
    ):
        model(torch.randn(B, D))
