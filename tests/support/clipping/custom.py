# SPDX-License-Identifier: Apache-2.0
"""Modules as users write them, none of which has a rule; a new one is one entry of `CUSTOM`.

Shapes: B examples, T positions, D features.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

D, T = 6, 4


class Own(nn.Module):
    """Parameters, buffers and children that the forwards below use; unused ones get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, D) * 0.4)
        self.g = nn.Parameter(torch.rand(D) + 0.5)
        self.s = nn.Parameter(torch.tensor(0.7))
        self.small = nn.Parameter(torch.full((D,), 1e-6))
        self.register_buffer("fixed", torch.randn(D, D))


class Around(nn.Module):
    """A model with layers before and after the module in question."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(D, D), inner, nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(tensor_of(self.inner(torch.tanh(self.before(x)) + 0.1)))


def tensor_of(value: object) -> Tensor:
    """The tensor of interest in whatever a module returned."""
    if isinstance(value, dict):
        return value["y"]
    if isinstance(value, tuple | list):
        return value[0]
    return value if isinstance(value, Tensor) else value.y


def written(forward: Callable, base: type = Own) -> Callable[[], nn.Module]:
    """The model around a module with that forward, a function of (module, x)."""
    return lambda: Around(type("Written", (base,), {"forward": forward})())


@dataclasses.dataclass(frozen=True)
class Result:
    y: Tensor
    label: str = "ours"


Pair = namedtuple("Pair", "y n")


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


# -- forwards -----------------------------------------------------------------------------------------------------


def in_place_mask(m, x):
    y = x.clone()
    y[y < 0] = 0.0
    return y @ m.w


def changes_its_input(m, x):
    x.mul_(m.g).clamp_(min=-0.5)
    return x @ m.w


def looks_at_numbers(m, x):
    assert not torch.isnan(x).any() and x.abs().max().item() < 100
    return x @ m.w


def branch_of_each_row(m, x):
    return torch.stack([row @ m.w if row.sum() > 0 else row * m.g for row in x])


def routed(m, x):
    """Two experts, each given the rows that chose it."""
    scores = torch.softmax(x @ m.w, -1)[:, :2]
    best, index = scores.max(1)
    out = torch.zeros_like(x)
    for expert, weight in enumerate((m.w, m.fixed * m.g)):
        rows = (index == expert).nonzero().flatten()
        if len(rows):
            out = out.index_add(0, rows, (x[rows] @ weight) * best[rows, None])
    return out


def rotary(m, x):
    """Attention by hand over T positions made of x, with rotary positions."""
    h = (x.unsqueeze(1) * torch.linspace(0.5, 1.5, T, dtype=x.dtype)[:, None]) @ m.w
    angle = torch.arange(T, dtype=x.dtype)[:, None] * (0.5 ** torch.arange(D // 2, dtype=x.dtype))
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    turned = torch.cat((-h[..., D // 2 :], h[..., : D // 2]), -1)
    q = h * cos + turned * sin
    scores = (q @ q.mT / math.sqrt(D)).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ (h * m.g)).mean(1)


def quantised(m, x):
    index = torch.cdist(x, m.w).argmin(1)
    return x + (m.w[index] - x).detach() + 0.1 * m.w[index]


def embeds(m, x):
    return F.embedding((x.abs() * 3).long().clamp(max=D - 1), m.w).sum(1) * m.g


def convolves(m, x):
    return F.conv1d(x.unsqueeze(1), m.w[:, None, :3], padding=1).mean(1) * m.g


def spectral(m, x):
    return torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(m.w[: D // 2 + 1, :2].contiguous()), n=D)


def complex_output(m, x):
    return {"y": torch.fft.rfft(x @ m.w).abs() @ m.fixed[: D // 2 + 1], "spectrum": torch.fft.rfft(x)}


def autograd_inside(m, x):
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (force,) = torch.autograd.grad((z**3).sum(), z)
    return (x + force.detach()) @ m.w


def asks_for_gradients(m, x):
    x.requires_grad_()
    return x @ m.w


PLAIN: dict[str, Callable] = {
    "product": lambda m, x: x @ m.w * m.g + m.s,
    "view": lambda m, x: x.view(x.size(0), 2, -1).flatten(1) @ m.w,
    "rows by index": lambda m, x: x[torch.arange(len(x))] @ m.w,
    "in-place mask": in_place_mask,
    "changes its input": changes_its_input,
    "looks at numbers": looks_at_numbers,
    "a branch of each row": branch_of_each_row,
    "one-hot": lambda m, x: F.one_hot(x.argmax(1), D).to(x.dtype) @ m.w,
    "nonzero and scatter": lambda m, x: (
        x.new_zeros(x.shape).index_put((x > 0).nonzero(as_tuple=True), x[x > 0]) @ m.w
    ),
    "top-k": lambda m, x: x.gather(1, x.topk(3, 1).indices) @ m.w[:3],
    "experts by index": routed,
    "rotary attention": rotary,
    "sorted": lambda m, x: x.sort(1).values.cumsum(1) @ m.w,
    "einsum": lambda m, x: torch.einsum("bi,ij,j->bj", x, m.w, m.g),
    "layer norm by hand": lambda m, x: (
        (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt() * m.g
    ),
    "functional norms": lambda m, x: F.layer_norm(F.rms_norm(x, (D,), m.g), (D,), m.g) @ m.w,
    "batch norm on fixed statistics": lambda m, x: (
        F.batch_norm(x, m.fixed[0], m.fixed[1].abs() + 1, m.g, m.g) @ m.w
    ),
    "weight scaled by its norm": lambda m, x: x @ (m.w / torch.linalg.matrix_norm(m.w, 2)) * m.w.norm(),
    "matrix exponential": lambda m, x: x @ torch.matrix_exp(m.w - m.w.T),
    "solve": lambda m, x: torch.linalg.solve(torch.eye(D, dtype=x.dtype) + m.w @ m.w.T, x.T).T,
    "straight-through sign": lambda m, x: Sign.apply(x) @ m.w,
    "vector quantisation": quantised,
    "embedding of its own": embeds,
    "convolution of its own": convolves,
    "spectral filter": spectral,
    "complex outputs": complex_output,
    "checkpoint inside": lambda m, x: checkpoint(lambda z: torch.tanh(z @ m.w) * m.g, x, use_reentrant=False),
    "autograd inside": autograd_inside,
    "asks its input for gradients": asks_for_gradients,
    "part without gradients": lambda m, x: x @ m.w + (x @ m.w).detach() * m.g,
    "rows in a loop": lambda m, x: torch.stack([row @ m.w for row in x]),
    "chunks": lambda m, x: torch.cat([part @ m.w for part in x.split(1)]),
    "nothing to do for no rows": lambda m, x: x @ m.w if len(x) else x,
    "a scale of 1e-6": lambda m, x: x + m.small * torch.tanh(x @ m.w),
    "buffer": lambda m, x: x @ (m.w + m.s * m.fixed),
    "gelu of numpy constants": lambda m, x: F.gelu(x * float(np.sqrt(2.0))) @ m.w,
    "several uses": lambda m, x: torch.tanh(torch.tanh(x @ m.w) @ m.w) @ m.w,
    "returns a dict": lambda m, x: {"y": x @ m.w, "none": None, "n": 3},
    "returns a tuple and a penalty": lambda m, x: (x @ m.w, m.w.pow(2).sum()),
    "returns a tuple and its weights": lambda m, x: (x @ m.w, m.w),
    "returns a named tuple": lambda m, x: Pair(x @ m.w, 3),
    "returns a dataclass": lambda m, x: Result(x @ m.w),
    "returns a namespace": lambda m, x: SimpleNamespace(y=x @ m.w, n=3),
    "returns a number for each example": lambda m, x: (
        (x @ m.w).sum(1, keepdim=True) * m.g,
        (x * m.g).sum(1),
    ),
    "returns integers too": lambda m, x: (x @ m.w, (x @ m.w).argmax(1)),
}


# -- forwards that draw ---------------------------------------------------------------------------------------


def reparametrised(m, x):
    mean, log = x @ m.w, (x * m.g).clamp(max=1)
    return mean + torch.randn_like(mean) * (log / 2).exp()


def draws_twice(m, x):
    kept = (torch.rand(len(x), 1, dtype=x.dtype) >= 0.3).to(x.dtype)
    return F.dropout(x * m.g * kept, 0.4) @ m.w


def steps_first(m, x):
    """Draws with the positions first."""
    return (torch.rand(T, len(x), D, dtype=x.dtype) * (x @ m.w)).mean(0)


def sampled_positions(m, x):
    chosen = torch.multinomial(torch.softmax(x, -1), 2)
    return x.gather(1, chosen) @ m.w[:2]


def seldom(m, x):
    """A mask that is seldom anything but ones, hidden by a scale of 1e-6."""
    return x + m.small * F.dropout(x @ m.w, 0.02)


def python_draw(m, x):
    return x @ m.w * (random.random() + np.random.rand())


def attends(m, x):
    h = (x.unsqueeze(1) * torch.linspace(0.5, 1.5, T, dtype=x.dtype)[:, None]) @ m.w
    return F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None] * m.g, dropout_p=0.3)[:, 0].mean(
        1
    )


RANDOM: dict[str, Callable] = {
    "dropout": lambda m, x: F.dropout(x @ m.w, 0.4) * m.g,
    "feature dropout": lambda m, x: F.dropout1d(x.unsqueeze(-1).expand(-1, -1, 2) * m.g[:, None], 0.4).sum(
        -1
    ),
    "alpha dropout": lambda m, x: F.alpha_dropout(x @ m.w, 0.3),
    "stochastic depth": lambda m, x: x + x @ m.w * (torch.rand(len(x), 1) < 0.7).to(x.dtype) / 0.7,
    "noise": lambda m, x: (x + 0.1 * torch.randn_like(x)) @ m.w,
    "noise set in place": lambda m, x: (x + torch.empty_like(x).normal_(0, 0.1)) @ m.w,
    "a Bernoulli of each row": lambda m, x: torch.bernoulli(torch.sigmoid(x)) @ m.w,
    "Gumbel softmax": lambda m, x: F.gumbel_softmax(x, hard=True) @ m.w,
    "reparametrised": reparametrised,
    "a distribution": lambda m, x: torch.distributions.Normal(x @ m.w, m.g.abs() + 1).rsample(),
    "leaky by chance": lambda m, x: F.rrelu(x @ m.w, training=True),
    "draws twice": draws_twice,
    "positions first": steps_first,
    "sampled positions": sampled_positions,
    "Bayesian weight": lambda m, x: x @ (m.w + m.s * torch.randn(D, D, dtype=x.dtype)),
    "one mask for all": lambda m, x: x @ m.w * (torch.rand(D) < 0.5).to(x.dtype),
    "a random permutation of features": lambda m, x: x[:, torch.randperm(D)] @ m.w,
    "seldom, under a scale of 1e-6": seldom,
    "Python's and numpy's numbers": python_draw,
    "attention with dropout": attends,
    "dropout under a checkpoint": lambda m, x: checkpoint(
        lambda z: F.dropout(z @ m.w, 0.4), x, use_reentrant=False
    ),
}


# -- modules with state and with children ------------------------------------------------------------------------


class Counts(Own):
    """Anneals a temperature by the number of its calls, kept as a number, in a list and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.history = 0, []
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(self.calls)
        self.seen += 1
        return torch.tanh(x @ self.w / (self.calls + len(self.history))) * self.seen * self.g


class Caches(Own):
    """Keeps its last output, and a table made at its first call."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(D, dtype=x.dtype)
        self.last = x @ self.w
        return self.last + self.table * self.g


class Listed(nn.Module):
    """Parameters in lists and dicts, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(D)) for _ in range(3)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.randn(D)), "again": self.scales[0]})

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = torch.tanh(x * scale)
        return x * self.named["again"] + self.named["shift"]


class Layers(nn.Module):
    """Parameters of its own around children with rules, one of them called twice."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D))
        self.inner = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(drop), nn.Linear(D, D))
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.inner(self.norm(x))
        return self.norm(x * self.scale + self.inner(x))


class Nested(nn.Module):
    """A parameter outside, modules with parameters of their own inside, which run in a list."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.places = nn.Parameter(torch.randn(1, 3, D))
        self.blocks = nn.ModuleList([Layers(drop), Layers(drop)])
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack((x, x * 2), 1)
        h = torch.cat((self.token.expand(len(x), -1, -1), h), 1) + self.places
        for block in self.blocks:
            h = self.drop(block(h))
        return h[:, 0]


class Tied(nn.Module):
    """Uses a child's parameter itself, beside calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.bias = nn.Linear(D, D), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(x)), self.inner.weight, self.bias)


class InPlace(nn.Module):
    """A child that changes what it is given, a parameter before it and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self.relu, self.clamp = nn.ReLU(inplace=True), Clamp()

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.a
        self.relu(h)
        h = h * self.b
        self.clamp(h)
        return h * self.a


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(-0.7, 0.7)


class Table(nn.Module):
    """A child without the batch: a network over coordinates, whose output all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D))
        self.coordinates = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, D))
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        shift = self.coordinates(torch.linspace(-1, 1, D, dtype=x.dtype)[:, None])
        return self.inner(x * self.scale) @ torch.softmax(shift, -1)


class Beside(nn.Module):
    """A learned first state beside a recurrent layer."""

    def __init__(self, layer: Callable[..., nn.Module] = nn.GRU) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, D))
        self.layer = layer(D, D, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1) * torch.linspace(0.5, 1.5, T, dtype=x.dtype)[:, None]
        state = self.first.expand(self.layer.num_layers, len(x), -1).contiguous()
        _, last = self.layer(x, (state, torch.tanh(state)) if isinstance(self.layer, nn.LSTM) else state)
        return (last[0] if isinstance(last, tuple) else last)[-1]


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1) * torch.linspace(0.5, 1.5, T, dtype=x.dtype)[:, None]
        return self.layer(h)[0][:, -1] if self.layer.batch_first else self.layer(h.transpose(0, 1))[0][-1]


class Skips(nn.Module):
    """Leaves out children by chance: another list of calls in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D))
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if torch.rand(()) < 0.5:
                x = torch.tanh(layer(x)) * self.scale
        return x


class SideChannel(nn.Module):
    """A child that reads what its parent has made of a parameter, beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D))
        self.inner = Reads()

    def forward(self, x: Tensor) -> Tensor:
        self.inner.factor = self.scale * 2
        return self.inner(x * self.scale)


class Reads(nn.Module):
    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


class Holds(nn.Module):
    """A frozen child, and one that is only there."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(D))
        self.frozen, self.unused = nn.Linear(D, D).requires_grad_(False), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = torch.softmax(self.frozen(x), -1)
        return self.frozen(x * self.scale) * weight


class Running(Own):
    """Normalises by a running average that no batch enters while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Running:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.w * self.g


def hooked() -> nn.Module:
    """Pre-hooks that change the input, of the module and of a child."""
    inner = Layers()
    inner.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    inner.norm.register_forward_hook(lambda m, args, out: out * 3)
    return inner


def normed(norm: Callable) -> Callable[[], nn.Module]:
    return lambda: norm(nn.Linear(D, D))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "counts its calls": Counts,
    "caches": Caches,
    "parameters in lists": Listed,
    "children called twice": Layers,
    "nested": Nested,
    "uses a child's parameter": Tied,
    "children that change their input": InPlace,
    "a child without the batch": Table,
    "first state of a GRU": Beside,
    "first state of an LSTM": lambda: Beside(nn.LSTM),
    "a side channel": SideChannel,
    "frozen and unused children": Holds,
    "running statistics": Running,
    "hooks that change inputs": hooked,
    "weight norm": normed(nn.utils.parametrizations.weight_norm),
    "spectral norm": normed(nn.utils.parametrizations.spectral_norm),
    "orthogonal": normed(nn.utils.parametrizations.orthogonal),
    "spectral norm, old": normed(nn.utils.spectral_norm),
    "a normed GRU": lambda: Recurrent(
        nn.utils.parametrizations.weight_norm(nn.GRU(D, D, batch_first=True), "weight_hh_l0")
    ),
    "pruned": lambda: prune.random_unstructured(nn.Linear(D, D), "weight", 0.3),
}


class Attends(nn.Module):
    """An encoder layer of torch, whose attention drops weights too."""

    def __init__(self, needs: bool = False) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.3, batch_first=True)
        self.attention = nn.MultiheadAttention(D, 2, dropout=0.3) if needs else None

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1) * torch.linspace(0.5, 1.5, T, dtype=x.dtype)[:, None]
        if self.attention is not None:
            h = h.transpose(0, 1)
            out, weights = self.attention(h, h, h)
            return out.mean(0) + weights.sum((1, 2))[:, None]
        return self.layer(h).mean(1)


RANDOM_MODULES: dict[str, Callable[[], nn.Module]] = {
    "dropout in children": lambda: Layers(0.4),
    "dropout in nested children": lambda: Nested(0.3),
    "children left out by chance": Skips,
    "an encoder layer of torch": lambda: Attends(),
    "attention that drops its weights": lambda: Attends(True),
    "dropout between recurrent layers": lambda: Recurrent(nn.LSTM(D, D, 2, dropout=0.4, batch_first=True)),
    "dropout between layers, positions first": lambda: Recurrent(nn.GRU(D, D, 2, dropout=0.4)),
    "dropout between layers, a first state": lambda: Beside(partial(nn.GRU, num_layers=2, dropout=0.3)),
}

CUSTOM: dict[str, Callable[[], nn.Module]] = {
    **{name: written(forward) for name, forward in PLAIN.items()},
    **{name: (lambda build=build: Around(build())) for name, build in MODULES.items()},
}

DRAWING: dict[str, Callable[[], nn.Module]] = {
    **{name: written(forward) for name, forward in RANDOM.items()},
    **{name: (lambda build=build: Around(build())) for name, build in RANDOM_MODULES.items()},
}
