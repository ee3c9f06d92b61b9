# SPDX-License-Identifier: Apache-2.0
"""Values that serve all examples: each example's gradient of them is that of a loop of autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from clipping import Gathering, Tape, UnrecordedParameter
from clipping.shared_values.followed_forward import FOLLOWED, ROWS, Spread
from tests.support.clipping.subjects import V

D, LONGEST = 8, 16


def per_example(model, losses, x):
    """The oracle: the gradient of each example by itself."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = []
    for row in x.split(1):
        found = torch.autograd.grad(losses(model, row).sum(), list(parameters.values()), allow_unused=True)
        rows.append(
            [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), found, strict=True)]
        )
    return {
        name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)
    }


def plain(model, x):
    return model(x).square().flatten(1).sum(1)


def require_exact(model, batches, losses=plain):
    """Each backward of one tape over `batches`, one after the other, delivers the oracle's gradients."""
    model = model.double()
    found = {}
    tape = Tape(model, lambda _: Gathering(lambda grads, _: found.update(grads)))
    expected = [per_example(model, losses, x) for x in batches]
    with tape:
        for x, want in zip(batches, expected, strict=True):
            found.clear()
            values = losses(model, x)
            tape.attribute([values], len(x))
            values.sum().backward()
            for name, value in want.items():
                got = found[name].dense() if name in found else torch.zeros_like(value)
                torch.testing.assert_close(
                    got, value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
                )
    assert all(p.grad is None for p in model.parameters())
    return tape


def tokens(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, V, shape, generator=generator) for shape in shapes]


# As long as the batch, shorter, of one example, of one position: nothing may be read off a shape.
BATCHES = tokens((5, 9), (5, 5), (1, 9), (3, 7), (9, 9), (4, 1), (1, 1))


class Base(nn.Module):
    """Embeds tokens, adds what `extra` makes of (model, hidden, length), and mixes."""

    def __init__(self, extra, **parts):
        super().__init__()
        self.embed, self.mix = nn.Embedding(V, D), nn.Linear(D, D)
        self.extra = extra
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return torch.tanh(self.mix(self.extra(self, self.embed(x), x.shape[1])))


def relative(length):
    at = torch.arange(length)
    return at[:, None] - at + LONGEST


def biased(m, h, t):
    bias = m.bias(relative(t)).permute(2, 0, 1).unsqueeze(0)
    return (torch.softmax((h @ h.mT).unsqueeze(1) + bias, -1) @ h.unsqueeze(1)).sum(1)


def fused(m, h, t):
    bias = m.bias(relative(t)).permute(2, 0, 1)[None]
    heads = h.unflatten(2, (2, D // 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias).transpose(1, 2).flatten(2)


def in_place(m, h, t):
    scores = h @ h.mT
    scores += m.bias(relative(t))[..., 0].expand(scores.shape)
    return torch.softmax(scores, -1) @ h


def network_of_a_table(m, h, t):
    table = 2 * torch.sigmoid(m.bias(m.norm(torch.relu(m.first(relative(t).double()[..., None])))))
    return torch.softmax(h @ h.mT + table[..., 0], -1) @ h


def disentangled(m, h, t):
    # Repeated for each head of each example, as DeBERTa does, and seen by the layer that sees the examples too.
    keys = m.key(m.norm(m.table.weight[: 2 * t]).unsqueeze(0)).view(-1, 2, D // 2).transpose(0, 1)
    heads = m.key(h).unflatten(2, (2, D // 2)).transpose(1, 2).flatten(0, 1)
    return h + torch.bmm(heads, keys.repeat(len(h), 1, 1).mT).sum(-1).view(len(h), 2, t).mT.sum(
        -1, keepdim=True
    )


def prompts(m, h, t):
    return torch.cat([m.table(torch.arange(3)).expand(len(h), -1, -1), h], 1)


def queries(m, h, t):
    latents = m.norm(m.table.weight[:3]).unsqueeze(0).repeat(len(h), 1, 1)
    return torch.softmax(latents @ h.mT, -1) @ h


def hypernetwork(m, h, t):
    weight = m.first(torch.ones(1, dtype=h.dtype)).view(1, D)
    return h * weight + m.bias(torch.tensor(1)).sum()


def set_items(m, h, t):
    h = h.clone()
    h[:, 0] = m.table.weight[0]
    buffer = torch.zeros(len(h), 2, D, dtype=h.dtype)
    buffer[:] = m.table(torch.arange(2))
    return torch.cat([h, buffer], 1)


def table():
    return {"table": nn.Embedding(2 * LONGEST, D)}


def bias(heads):
    return {"bias": nn.Embedding(2 * LONGEST + 1, heads)}


MODELS = {
    "positions (T,)": lambda: Base(lambda m, h, t: h + m.table(torch.arange(t)), **table()),
    "positions (1, T)": lambda: Base(lambda m, h, t: h + m.table(torch.arange(t)[None]), **table()),
    "positions (B, T)": lambda: Base(lambda m, h, t: h + m.table(torch.arange(t).expand(len(h), t)), **table()),
    "positions, normalised": lambda: Base(
        lambda m, h, t: h * m.norm(m.table(torch.arange(t))), norm=nn.LayerNorm(D), **table()
    ),
    "positions of a buffer": lambda: Base(
        lambda m, h, t: h - m.table(m.at.index[:t]), at=Index(), **table()
    ),
    "positions of the weight": lambda: Base(lambda m, h, t: h + m.table.weight[:t], **table()),
    "relative bias": lambda: Base(biased, **bias(2)),
    "relative bias, fused attention": lambda: Base(fused, **bias(2)),
    "relative bias, in place": lambda: Base(in_place, **bias(1)),
    "network of a table": lambda: Base(network_of_a_table, first=nn.Linear(1, 6), norm=nn.LayerNorm(6), bias=nn.Linear(6, 1)),
    "disentangled": lambda: Base(disentangled, key=nn.Linear(D, D), norm=nn.LayerNorm(D), **table()),
    "prompts": lambda: Base(prompts, **table()),
    "learned queries": lambda: Base(queries, norm=nn.LayerNorm(D), **table()),
    "hypernetwork": lambda: Base(hypernetwork, first=nn.Linear(1, D), **bias(1)),
    "assigned": lambda: Base(set_items, **table()),
    "product with all": lambda: Base(lambda m, h, t: h @ m.table.weight[:D], **table()),
    "einsum": lambda: Base(
        lambda m, h, t: h + torch.einsum("bld,lrd->blr", h, m.table(relative(t)[:, :D] % 9)).sum(-1, keepdim=True), **table()
    ),
    "convolved image": lambda: Base(
        lambda m, h, t: h + m.conv(torch.ones(1, 1, D, dtype=h.dtype)).mean(1), conv=nn.Conv1d(1, 2, 3, padding=1)
    ),
    "two uses": lambda: Base(
        lambda m, h, t: (h + m.table(torch.arange(t))) * m.table(torch.arange(t)).unsqueeze(0), **table()
    ),
}  # fmt: skip


class Index(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("index", torch.arange(LONGEST), persistent=False)


@pytest.mark.parametrize("name", MODELS)
def test_guarantee_each_example_has_its_own_gradient_of_what_serves_all(name):
    torch.manual_seed(0)
    require_exact(MODELS[name](), BATCHES)


PLANS = {
    "positions (T,)": {Spread(1)},
    "positions (1, T)": {Spread(0)},
    "positions (B, T)": {ROWS},
    "relative bias": {FOLLOWED},
}


@pytest.mark.parametrize("name", PLANS)
def test_positions_are_followed_once_and_biases_always(name):
    shares = require_exact(MODELS[name](), BATCHES)._shares
    assert set(shares._plan.values()) == PLANS[name]
    assert shares._always == (FOLLOWED in PLANS[name])


def test_a_model_in_which_nothing_serves_all_is_followed_once(monkeypatch):
    model = Base(lambda m, h, t: h)
    tape = require_exact(model, BATCHES[:1])
    assert not tape._shares._plan and not tape._shares._always and "" in tape._shares._settled
    tape.doubt()
    assert not tape._shares._settled


@pytest.mark.parametrize(
    "name", ["positions (T,)", "relative bias", "relative bias, fused attention", "product with all"]
)
def test_checkpoints_are_run_again_without_the_mode(name):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    torch.manual_seed(0)
    require_exact(Checkpointed(MODELS[name]()), BATCHES)


def test_heads_before_examples_are_not_taken_for_them_where_they_are_as_many():
    def heads_first(m, h, t):
        scores = (h @ h.mT).expand(2, -1, -1, -1)  # two heads, then the examples
        bias = m.bias(relative(t)).permute(2, 0, 1).unsqueeze(1)
        return (torch.softmax(scores + bias, -1) @ h).sum(0) + h

    torch.manual_seed(0)
    require_exact(Base(heads_first, **bias(2)), tokens((5, 6), (2, 6), (3, 2), (1, 4), (2, 2)))


def test_a_value_that_leaves_the_model_before_it_meets_the_examples_is_refused():
    model = Base(lambda m, h, t: h, **bias(1))
    model.forward = lambda x: (model.mix(model.embed(x)), model.bias(relative(4)))
    with (
        Tape(model, lambda _: Gathering(lambda *_: None)),
        pytest.raises(UnrecordedParameter, match="'bias', which serves all"),
    ):
        hidden, scores = model(torch.zeros(3, 4, dtype=torch.long))
        (hidden.sum() + scores.sum()).backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_value_that_serves_all_is_not_changed_in_place_by_examples():
    def change(m, h, t):
        at = m.table(torch.arange(t).expand(len(h), t))
        return at.add_(h)

    model = Base(change, **table()).double()
    with (
        Tape(model, lambda _: Gathering(lambda *_: None)),
        pytest.raises(TypeError, match="returns a new tensor"),
    ):
        model(torch.zeros(3, 4, dtype=torch.long))


def test_what_examples_wrote_into_counts_as_theirs():
    # Zeros are a constant until the batch is copied into them; their rows are the examples' from then on.
    def copied(m, h, t):
        kept = torch.zeros_like(h[:1]).new_zeros(h.shape)
        kept.copy_(h.detach())
        return kept + m.table(torch.arange(t))

    torch.manual_seed(0)
    require_exact(Base(copied, **table()), tokens((5, 5), (5, 5), (3, 4)))


def test_a_mode_that_an_interrupt_left_is_left_at_the_next_forward():
    def interrupt(m, h, t):
        raise KeyboardInterrupt

    model = Base(interrupt, **table())
    before = (
        torch.overrides._get_current_function_mode_stack()
        if hasattr(torch.overrides, "_get_current_function_mode_stack")
        else []
    )
    with Tape(model, lambda _: Gathering(lambda *_: None)):
        with pytest.raises(KeyboardInterrupt):
            model(torch.zeros(3, 4, dtype=torch.long))
    after = (
        torch.overrides._get_current_function_mode_stack()
        if hasattr(torch.overrides, "_get_current_function_mode_stack")
        else []
    )
    assert len(before) == len(after)


def test_the_bound_of_one_example_holds_where_all_share_a_table():
    torch.manual_seed(0)
    model = MODELS["relative bias"]().double()
    norms = []
    tape = Tape(model, lambda _: Gathering(lambda grads, _: norms.append(grads["bias.weight"].sq_norm())))
    with tape:
        for size in (4, 5):
            x = tokens((5, 6))[0][:size]
            losses = plain(model, x)
            tape.attribute([losses], size)
            losses.sum().backward()
    assert math.isclose(float((norms[1][:4] - norms[0]).abs().max()), 0.0, abs_tol=1e-9)
