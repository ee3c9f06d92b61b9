# SPDX-License-Identifier: Apache-2.0
"""The door for rules of one's own, the structures that rules return, and the calls that rules refuse."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from clipping import Dense, FlatClipper, Inputs, MixesExamples, Outer, Routed, examine, rule
from clipping.rules import rule_for
from clipping.rules.linear import conv1d_transposed, linear
from clipping.rules.registry import batch_first
from tests.support.clipping.subjects import (
    SUBJECTS,
    Recorder,
    clipped_by_hand,
    example_gradients,
    mixtral,
    squares,
)

B, T, D = 4, 3, 8


def recorded(model, clip_norm=1e6):
    return Recorder(model, FlatClipper(clip_norm))


def untouched(model):
    return all(p.grad is None for p in model.parameters())


# -- rules of one's own -----------------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(D, dtype=torch.float64))
        self.shift = nn.Parameter(torch.randn(D, dtype=torch.float64))

    def forward(self, x):
        return x * self.scale + self.shift


class Split(Scale):
    def forward(self, x):
        return x * self.scale, (x + self.shift).sum(-1)


def exact(layer, inputs, grad):
    return {"scale": Dense(grad * inputs.first), "shift": Dense(grad)}


def test_a_rule_is_one_function():
    class Own(Scale):
        def forward(self, x):
            return super().forward(x)

    own = rule(Own, parameters=("sc*", "shift"))(exact)
    assert own is exact
    model, x = Own(), torch.randn(B, D, dtype=torch.float64)
    model.shift.requires_grad_(False)  # what a rule returns for frozen parameters is ignored
    with recorded(model) as recorder:
        assert recorder.tape.layers[0].rule.function is exact
        squares(model(x)).sum().backward()
    expected = clipped_by_hand(example_gradients(SUBJECTS["mlp"], model, (x,), B), FlatClipper(1e6))
    torch.testing.assert_close(recorder.total()["scale"], expected["scale"])
    assert set(recorder.total()) == {"scale"}


def test_a_rule_serves_several_outputs():
    @rule(Split, parameters=("scale", "shift"), batch_dims=batch_first)
    def split(layer, inputs, grads):
        first, second = grads
        assert second is None
        return {"scale": Dense(first * inputs.first)}

    model, x = Split(), torch.randn(B, D, dtype=torch.float64)
    with recorded(model) as recorder:
        squares(model(x)[0]).sum().backward()
    expected = torch.autograd.grad(squares(model(x)[0]).sum(), model.scale)[0]
    torch.testing.assert_close(recorder.total()["scale"], expected)
    assert (recorder.total()["shift"] == 0).all()


MISTAKES = {
    "misspelt": lambda layer, inputs, grad: {"scael": Dense(grad), "shift": Dense(grad)},
    "other rows": lambda layer, inputs, grad: {"scale": Dense(grad[:1]), "shift": Dense(grad)},
    "other shape": lambda layer, inputs, grad: {"scale": Dense(grad.sum(1)), "shift": Dense(grad)},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_rule_that_returns_something_else_is_refused(name):
    class Wrong(Scale):
        def forward(self, x):
            return super().forward(x)

    rule(Wrong, parameters=("scale", "shift"))(MISTAKES[name])
    model = Wrong()
    with recorded(model) as recorder:
        with pytest.raises(
            ValueError,
            match=r"rule of layer 'model' to return gradients of \['scale', 'shift'\] for 4 .*; return {parameter name",
        ):
            squares(model(torch.randn(B, D).double())).sum().backward()
    assert untouched(model) and recorder.sizes == []


def test_a_rule_that_forgets_a_parameter_is_refused():
    class Forgets(Scale):
        def forward(self, x):
            return super().forward(x)

    rule(Forgets, parameters=("scale", "shift"))(lambda layer, inputs, grad: {"scale": Dense(grad)})
    model = Forgets()
    with recorded(model), pytest.raises(ValueError, match=r"got none of \['shift'\]; return them, or freeze"):
        squares(model(torch.randn(B, D).double())).sum().backward()


def test_a_rule_for_one_output_refuses_two():
    class Two(Split):
        def forward(self, x):
            return super().forward(x)

    rule(Two, parameters=("scale", "shift"))(exact)
    model = Two()
    with recorded(model), pytest.raises(TypeError, match="got 2; give its rule batch_dims"):
        squares(model(torch.randn(B, D).double())).sum().backward()


SERVED = (
    *(nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)),
    *(nn.ConvTranspose1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1)),
    *(
        nn.InstanceNorm1d(2, affine=True),
        nn.InstanceNorm2d(2, affine=True),
        nn.InstanceNorm3d(2, affine=True),
    ),
    *(nn.LayerNorm(2), nn.RMSNorm(2), nn.GroupNorm(1, 2), nn.PReLU(), nn.PReLU(2)),
    *(nn.Linear(2, 2), nn.Bilinear(2, 2, 2), nn.Embedding(2, 2), nn.EmbeddingBag(2, 2)),
    *(
        nn.LSTM(2, 2),
        nn.GRU(2, 2),
        nn.RNN(2, 2),
        nn.LSTM(2, 3, proj_size=1, num_layers=2, bidirectional=True),
    ),
    *(nn.LSTMCell(2, 2), nn.GRUCell(2, 2), nn.RNNCell(2, 2)),
    *(nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=2, add_bias_kv=True)),
)


@pytest.mark.parametrize("layer", SERVED, ids=repr)
def test_layers_of_torch_have_a_rule_of_their_own(layer):
    assert rule_for(layer) is not None


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2-MoE", "transformer", "GPT-2", "Llama, tied"])
def test_models_run_without_the_generic_rule(name):
    with recorded(SUBJECTS[name].build()) as recorder:
        assert all(layer.rule is not None for layer in recorder.tape.layers)


def test_a_layer_with_other_parameters_has_no_rule():
    class Wider(nn.Linear):
        def __init__(self):
            super().__init__(D, D)
            self.more = nn.Parameter(torch.ones(D))

    assert rule_for(nn.Linear(D, D)) is not None
    assert rule_for(Wider()) is None
    assert (
        rule_for(nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(D, 2), "in_proj_weight")) is None
    )


# -- what the rules hold ----------------------------------------------------------------------------------------


def held(layer, args, grads):
    return rule_for(layer).function(layer, Inputs(args, {}), grads)


def test_recurrence_and_attention_hold_no_weight_gradient_per_example():
    x = torch.randn(B, T, 64)
    lstm = nn.LSTM(64, 32, 2, batch_first=True, bidirectional=True)
    found = held(lstm, (x,), (torch.randn(B, T, 64), None, None))
    assert {type(found[name]) for name in found if name.startswith("weight")} == {Outer}
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    found = held(attention, (x, x, x), (torch.randn(B, T, 64), None))
    assert type(found["in_proj_weight"]) is type(found["out_proj.weight"]) is Outer
    assert found["in_proj_weight"].left.shape == (B, 1, T, 192)  # one input: one group
    found = held(attention, (x, x * 2, x), (torch.randn(B, T, 64), None))
    assert found["in_proj_weight"].left.shape == (B, 3, T, 64)


def test_frozen_projections_do_not_hide_the_output_projection():
    model = nn.MultiheadAttention(D, 2, batch_first=True).double()
    model.in_proj_weight.requires_grad_(False)
    model.in_proj_bias.requires_grad_(False)
    x = torch.randn(B, T, D, dtype=torch.float64)
    with recorded(model) as recorder:
        squares(model(x, x, x)[0]).sum().backward()
    expected = torch.autograd.grad(squares(model(x, x, x)[0]).sum(), model.out_proj.weight)[0]
    torch.testing.assert_close(recorder.total()["out_proj.weight"], expected)
    assert set(recorder.total()) == {"out_proj.weight", "out_proj.bias"}


@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_keep_their_weights_after_a_failure(build):
    model = build(D, 6, batch_first=True)
    flat, names = model._flat_weights, dict(model.named_parameters())
    with recorded(model):
        with pytest.raises(RuntimeError):
            model(torch.randn(B, T, D + 1))
        assert model._flat_weights is flat and dict(model.named_parameters()) == names
    assert model._flat_weights is flat


PACKINGS = {
    "sorted": ((3, 2, 2, 1), {}),
    "in any order": ((2, 3, 1, 2), {"enforce_sorted": False}),
    "of one length": ((3, 3, 3, 3), {}),
    "of one position": ((1, 1, 1, 1), {"enforce_sorted": False}),
}


@pytest.mark.parametrize("lengths", PACKINGS)
@pytest.mark.parametrize("used", ["outputs", "states", "all"])
@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_are_those_without_their_padding(build, used, lengths):
    """Each example's gradient is that of its own sequence alone, unpadded."""
    torch.manual_seed(0)
    lengths, options = PACKINGS[lengths]
    model = build(D, 6, num_layers=2, bidirectional=True, batch_first=True).double()
    x = torch.randn(B, T, D, dtype=torch.float64)

    def loss(given):
        out, last = model(given)
        last = last if isinstance(last, tuple) else (last,)
        kept = {"outputs": [out], "states": last, "all": [out, *last]}[used]
        return sum((x.data if isinstance(x, PackedSequence) else x).square().sum() for x in kept)

    expected = {}
    for row, length in zip(x, lengths, strict=True):
        found = torch.autograd.grad(loss(row[None, :length]), list(model.parameters()))
        norm = torch.sqrt(sum(g.square().sum() for g in found))
        for (name, _), g in zip(model.named_parameters(), found, strict=True):
            expected[name] = expected.get(name, 0) + g * min(1.0, 0.5 / float(norm))
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, **options)
    with recorded(model, 0.5) as recorder:
        loss(packed).backward()
    assert recorder.sizes == [B]
    for name, value in recorder.total().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10)


def test_an_infinite_sequence_of_a_packed_batch_spoils_no_other():
    model = nn.LSTM(D, 6, bidirectional=True)
    x = torch.randn(T, B, D)
    with recorded(model, 0.5) as recorder:
        model(pack_padded_sequence(x[:, :3], [3, 2, 1], enforce_sorted=True))[0].data.sum().backward()
    x[1, 3] = torch.inf
    with recorded(model, 0.5) as other:
        model(pack_padded_sequence(x, [3, 2, 1, 2], enforce_sorted=False))[0].data.sum().backward()
    for name, value in other.total().items():
        torch.testing.assert_close(value, recorder.total()[name])


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(D, D, batch_first=True)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x):
        hidden = checkpoint(lambda h: self.lstm(h)[0], x, use_reentrant=False)
        return checkpoint(lambda h: self.attention(h, h, h)[0], hidden, use_reentrant=False)


def test_recurrence_and_attention_in_checkpoints():
    model, x = Recomputed().double(), torch.randn(B, T, D, dtype=torch.float64)
    with recorded(model) as recorder:
        squares(model(x)).sum().backward()
    expected = torch.autograd.grad(squares(model(x)).sum(), list(model.parameters()))
    for value, other in zip(recorder.total().values(), expected, strict=True):
        torch.testing.assert_close(value, other)


# -- what the rules refuse --------------------------------------------------------------------------------------


class Owning(nn.Module):
    """A module without a rule, given a packed sequence."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x.data * self.scale


def packed(model, lengths=(3, 2, 2, 1), **options):
    return model(
        pack_padded_sequence(torch.randn(B, T, D), torch.tensor(lengths), batch_first=True, **options)
    )


def attends(x):
    return lambda model: model(x, x, x)


REFUSED = {
    "packed": (Owning, packed, TypeError, r"padded tensors .*; got a PackedSequence, .*to nn.LSTM, nn.GRU or nn.RNN only"),
    "one sequence": (lambda: nn.GRU(D, 6), lambda m: m(torch.randn(T, D)), ValueError, r"got \(3, 8\), a single sequence .*unsqueeze"),
    "one cell input": (lambda: nn.LSTMCell(D, 6), lambda m: m(torch.randn(D)), ValueError, r"inputs \(B, D\) at LSTMCell; got \(8,\), .*unsqueeze"),
    "one query": (lambda: nn.MultiheadAttention(D, 2), attends(torch.randn(T, D)), ValueError, r"a batch \(B, L, E\) .*; got an output of shape \(3, 8\), .*unsqueeze"),
    "one image": (lambda: nn.Conv2d(3, D, 2), lambda m: m(torch.randn(3, 5, 5)), ValueError, r"4 dimensions, the batch first, at Conv2d; got \(3, 5, 5\), .*unsqueeze"),
    "one image enlarged": (lambda: nn.ConvTranspose1d(3, D, 2), lambda m: m(torch.randn(3, 5)), ValueError, r"3 dimensions, .* at ConvTranspose1d"),
    "one image normalised": (lambda: nn.InstanceNorm2d(3, affine=True), lambda m: m(torch.randn(3, 5, 5)), ValueError, r"4 dimensions, .* at InstanceNorm2d"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_no_rule_can_serve_are_refused(name):
    build, call, error, text = REFUSED[name]
    model = build()
    with recorded(model) as recorder:
        with pytest.raises(error, match="expected .*" + text):
            call(model)
    assert untouched(model) and recorder.sizes == []


def test_dropout_that_does_nothing_is_no_reason_to_refuse():
    model = nn.ModuleList([nn.LSTM(D, D, 2, dropout=0.1), nn.MultiheadAttention(D, 2, dropout=0.1)]).eval()
    x = torch.randn(B, B, D)
    with recorded(model) as recorder:
        hidden = model[0](x)[0]
        model[1](hidden, hidden, hidden)[0].sum().backward()
    assert recorder.sizes == [B]


def test_bags_that_look_at_the_batch_are_refused():
    model = nn.EmbeddingBag(5, D, max_norm=1.0)
    with (
        recorded(model),
        pytest.raises(ValueError, match="without max_norm and scale_grad_by_freq, which depend"),
    ):
        model(torch.randint(0, 5, (B, 3)))
    assert untouched(model)


# -- mixtures of experts ----------------------------------------------------------------------------------------


class Selecting(nn.Module):
    """Each expert gets the rows that chose it."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, 2)
        self.experts = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])

    def forward(self, x):
        shares = torch.softmax(self.router(x), -1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mine = shares.argmax(-1) == index
            out[mine] = expert(x[mine]) * shares[mine][:, index : index + 1]
        return out


def test_experts_that_get_a_selection_of_rows_are_refused_where_no_losses_tell_whose_they_are():
    model, x = Selecting(), torch.randn(6, T, D)
    model.head = nn.Linear(D, D)
    with recorded(model) as recorder:
        with pytest.raises(
            ValueError,
            match=r"one row for each example at 'experts.\d', .*; got another number of rows; give the losses",
        ):
            squares(model.head(model(x))).sum().backward()
    assert untouched(model) and recorder.sizes == []


def tokens():
    return torch.randint(0, 13, (B, 5))


def test_experts_are_held_slot_by_slot():
    model = SUBJECTS["Mixtral"].build()
    layer = model.model.layers[0].mlp.experts
    rows = (torch.randn(B, T, D), torch.randint(0, 3, (B, T, 2)), torch.rand(B, T, 2))
    found = held(layer, rows, (torch.randn(B, T, D),))
    assert {type(grads) for grads in found.values()} == {Routed}
    assert found["gate_up_proj"].left.shape == (B, 2 * T, 32)


def test_load_balancing_losses_are_refused():
    model = SUBJECTS["Mixtral"].build()
    with recorded(model) as recorder:
        outputs = model(tokens(), output_router_logits=True)
        with pytest.raises(
            MixesExamples, match=r"logits of MixtralTopKRouter to stay .*; got a gradient .*=False"
        ):
            (outputs.logits.square().sum() + outputs.aux_loss).backward()
        model(tokens(), output_router_logits=True).logits.square().sum().backward()
    assert recorder.sizes == [B] and untouched(model)
    with pytest.raises(
        MixesExamples, match=r"its load-balancing loss averages over the batch; set config.output"
    ):
        examine(mixtral(output_router_logits=True))


def test_a_layer_without_a_rule_inside_a_folding_block_is_refused():
    model = SUBJECTS["Mixtral"].build()
    plain = model.model.layers[0].mlp.gate.forward
    model.model.layers[0].mlp.gate.forward = lambda x: plain(x)
    with (
        recorded(model),
        pytest.raises(
            ValueError,
            match=r"'model.layers.0.mlp.gate' in MixtralSparseMoeBlock to have a rule and to see every",
        ),
    ):
        model(tokens())
    del model.model.layers[0].mlp.gate.forward


def test_a_selection_of_rows_inside_a_folding_block_is_refused():
    model = SUBJECTS["Qwen2-MoE"].build()
    block = model.model.layers[0].mlp
    plain = block.shared_expert.forward
    block.shared_expert.forward = lambda x: torch.cat((plain(x[:2]), x[2:]))
    with recorded(model), pytest.raises(ValueError, match="route by zero weights instead of selecting rows"):
        model(tokens())
    del block.shared_expert.forward


@pytest.mark.parametrize("transposed", [False, True])
def test_under_autocast_a_gradient_is_made_of_what_the_layer_multiplied(transposed):
    # Autocast rounds the input of a layer; autograd's own gradient is made of the rounded one.
    torch.manual_seed(0)
    x, grad = torch.randn(3, 5, 8), torch.randn(3, 5, 4).bfloat16()
    if transposed:
        from transformers.pytorch_utils import Conv1D

        found = conv1d_transposed(Conv1D(4, 8), Inputs((x,), {}), grad)["weight"].dense()
    else:
        found = linear(nn.Linear(8, 4), Inputs((x,), {}), grad)["weight"].dense()
    wanted = torch.einsum("btp,btd->bpd", grad.double(), x.bfloat16().double())
    assert torch.allclose(found.double(), wanted.mT if transposed else wanted, rtol=1e-6, atol=1e-6)
