# SPDX-License-Identifier: Apache-2.0
"""The models on which the tape is judged, each with inputs and one loss per example; a new one is one entry.

Shapes: B examples, T positions, C channels, D features, V tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from clipping import (
    Clipping,
    Contribution,
    Costs,
    FlatClipper,
    Measuring,
    Summing,
    Sums,
    Tape,
    per_layer,
    per_parameter,
)
from clipping.gradients.path_costs import DEFAULT

V, T, D = 13, 5, 8


def squares(outputs: object) -> Tensor:
    """A loss per example that depends on every tensor of the outputs in its own way."""
    leaves = outputs if isinstance(outputs, tuple | list) else (outputs,)
    terms = []
    for index, out in enumerate(leaves):
        flat = out.reshape(out.shape[0], out.shape[1:].numel())
        target = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)
        terms.append(((flat - target) ** 2).sum(1) * (1 + index))
    return torch.stack(terms).sum(0)


def sequence_first(outputs: object) -> Tensor:
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    return squares(out.transpose(0, 1) if out.dim() > 2 else out)


def tokens_loss(outputs: object) -> Tensor:
    """Next-token cross entropy summed over the positions of each example, the first input being its label."""
    logits = outputs.logits
    targets = torch.arange(logits.shape[1]).expand(logits.shape[:2]) % logits.shape[2]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)


@dataclass(frozen=True)
class Subject:
    """`build` makes the model, `inputs` the keyword or positional arguments of a batch of that size."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple | dict]
    losses: Callable[[object], Tensor] = squares
    batch_dim: int = 0
    call: Callable[..., object] | None = None
    rtol: float = 1e-9

    @property
    def integer(self) -> bool:
        """Whether the model takes token indices, so that a bad example enters through its loss."""
        return not any(x.is_floating_point() for x in tensors(self.inputs(1)))

    def run(self, model: nn.Module, inputs: tuple | dict) -> Tensor:
        """Losses (B,)."""
        call = self.call or (lambda m, *a, **k: m(*a, **k))
        outputs = call(model, **inputs) if isinstance(inputs, dict) else call(model, *inputs)
        return self.losses(outputs)

    def take(self, inputs: tuple | dict, index: object) -> tuple | dict:
        """The examples `index` (a tensor of positions) of `inputs`."""
        dim = self.batch_dim
        pick = lambda x: x.index_select(dim if x.dim() > 1 else 0, index)  # noqa: E731
        if isinstance(inputs, dict):
            return {name: pick(x) for name, x in inputs.items()}
        return tuple(pick(x) for x in inputs)


def tensors(inputs: tuple | dict) -> list[Tensor]:
    return list(inputs.values()) if isinstance(inputs, dict) else list(inputs)


def cast(inputs: tuple | dict, dtype: torch.dtype) -> tuple | dict:
    change = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    if isinstance(inputs, dict):
        return {name: change(x) for name, x in inputs.items()}
    return tuple(change(x) for x in inputs)


def real(*shape: int) -> Callable[[int], tuple]:
    return lambda n: (torch.randn(n, *shape, dtype=torch.float64),)


def uneven(n: int) -> tuple:
    return (*real(T, D)(n), 1 + 2 * torch.arange(n) % T)


def ids(n: int) -> tuple:
    return (torch.randint(0, V, (n, T)),)


def input_ids(n: int) -> dict:
    return {"input_ids": torch.randint(0, V, (n, T))}


# -- plain layers ---------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 7, bias=False), nn.LayerNorm(7), nn.Linear(7, 3)
    )


def norms() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm((2, D)),
        nn.LayerNorm(D, bias=False),
        nn.RMSNorm(D),
        nn.LayerNorm(D, elementwise_affine=False),
        nn.RMSNorm((2, D), eps=1e-3),
        nn.Linear(D, 3),
    )


def conv1d(mode: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, stride=2, padding=2, padding_mode=mode),
        nn.GroupNorm(2, 6),
        nn.ReLU(inplace=True),
        nn.Conv1d(6, 4, 4, padding="same", dilation=1, groups=2, padding_mode=mode),
    )


def conv2d(mode: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), padding_mode=mode),
        nn.ReLU(inplace=True),
        nn.GroupNorm(4, 4),
        nn.Conv2d(4, 6, 3, groups=2, padding="same", dilation=(1, 2), bias=False, padding_mode=mode),
        nn.Conv2d(6, 6, 2, groups=6, padding="valid", padding_mode=mode),
    )


def conv3d(mode: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0), groups=2, padding_mode=mode),
        nn.ReLU(inplace=True),
        nn.Conv3d(4, 2, 2, dilation=(1, 1, 2), padding_mode=mode),
    )


def transposed1d() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose1d(4, 6, 3, stride=2, padding=2, output_padding=1),
        nn.InstanceNorm1d(6, affine=True),
        nn.PReLU(6),
        nn.ConvTranspose1d(6, 4, 2, dilation=3, groups=2, output_padding=2, bias=False),
        nn.PReLU(),
    )


def transposed2d() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(
            2, 4, (3, 2), stride=(1, 3), padding=(2, 1), output_padding=(0, 2), dilation=(2, 1)
        ),
        nn.InstanceNorm2d(4, affine=True),
        nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2),
    )


def transposed3d() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0), groups=2),
        nn.InstanceNorm3d(4, affine=True),
        nn.ConvTranspose3d(4, 2, 2, dilation=(1, 1, 2)),
    )


class Bilinears(nn.Module):
    """Two bilinear layers, one with few outputs and one with many, on positions."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Bilinear(D, D, 2), nn.Bilinear(2, D, 30, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.narrow(x, x.flip(-1))), input2=x)


class Bags(nn.Module):
    """Bags of embeddings by every mode, weighted, padded, with offsets and with empty bags."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = nn.EmbeddingBag(V, D, mode="sum")
        self.mean = nn.EmbeddingBag(V, D, mode="mean", padding_idx=3)
        self.max = nn.EmbeddingBag(V, D, mode="max", padding_idx=2)
        self.flat = nn.EmbeddingBag(V, D, mode="sum", include_last_offset=True)
        self.flat_mean, self.flat_max = nn.EmbeddingBag(V, D), nn.EmbeddingBag(V, D, mode="max")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weights = torch.linspace(0.5, 2, x.shape[1], dtype=self.sum.weight.dtype).expand(x.shape) * (1 + x)
        chosen = x > 5
        lengths = chosen.sum(1)
        offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        flat, scale = x[chosen], weights[chosen]
        return (
            self.sum(x, per_sample_weights=weights) * self.sum(x.flip(1)),
            self.mean(x),
            self.max(x),
            self.flat(flat, offsets, per_sample_weights=scale),
            self.flat_mean(flat, offsets[:-1]),
            self.flat_max(flat, offsets[:-1]),
        )


class SequenceFirst(nn.Module):
    """A sequence-first model around layers whose batch is always first."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.conv, self.norm = nn.Linear(D, 4), nn.Conv1d(4, 6, 2), nn.GroupNorm(2, 6)
        self.bag = nn.EmbeddingBag(V, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.conv(self.mix(x).permute(1, 2, 0)))
        return hidden.permute(2, 0, 1) * self.bag((x[..., 0].T > 0).long())


class Twice(nn.Module):
    """A layer used twice, one under two names, and an embedding tied to the head by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.alias = self.mix
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(x)))
        return self.head(self.norm(self.alias(self.norm(h)) + self.embed(x.flip(1))))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, padding_idx=2)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)).sum(1))


class Positions(nn.Module):
    """Position indices (1, T) that stand for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(V, D), nn.Embedding(T, D)
        self.mix = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1]).unsqueeze(0)
        return torch.tanh(self.mix(self.embed(x) + self.position(at))) * self.mix(self.position(at))


class ForAll(nn.Module):
    """Positions (T,), a bias (T, T) for all examples, and a child's weight that is used without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position, self.bias = nn.Embedding(V, D), nn.Embedding(T, D), nn.Embedding(2 * T, 1)
        self.mix, self.scale = nn.Linear(D, D), nn.Linear(1, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        h = self.embed(x) + self.position(at)
        bias = self.bias(at[:, None] - at + T).permute(2, 0, 1)
        mixed = torch.softmax(h @ h.mT + bias, -1) @ self.mix(h)
        return mixed * self.scale.weight[:, 0] + self.mix(self.position.weight[: len(at)])


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, 3)
        self.gate = Gate()

    def forward(self, *, hidden: Tensor, scale: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(input=hidden))
        return self.second(input=self.gate(x=hidden, scale=scale, power=2))


class Gate(nn.Module):
    """A raw parameter, a scalar parameter, and arguments by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))
        self.alpha = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, *, scale: Tensor, power: int) -> Tensor:
        return torch.sigmoid(x * self.weight) ** power * scale.unsqueeze(-1) + self.alpha * x


class Pair(nn.Module):
    """A generic module with several outputs, one of them unused by the loss, one an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / 4)
        self.inner = nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        hidden = self.inner(x) @ self.weight
        return torch.tanh(hidden), {"sum": hidden.sum(-1), "unused": hidden * 2}, hidden.argmax(-1)


class Generics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.many = Many()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(D, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, more, _ = self.pair(x)
        return self.normed(self.many(out)), more["sum"]


class Many(nn.Module):
    """Parameters in a ParameterList and a ParameterDict, whose containers have no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(D)) for _ in range(2)])
        self.shifts = nn.ParameterDict({"a": nn.Parameter(torch.randn(D))})

    def forward(self, x: Tensor) -> Tensor:
        for scale in self.scales:
            x = torch.tanh(x * scale)
        return x + self.shifts["a"]


class TiedGeneric(nn.Module):
    """A raw parameter of a generic module that is also an embedding's table and a linear layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.raw = Raw(self.embed.weight)
        self.shared = nn.Linear(D, D)
        self.block = Block(self.shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.raw(self.block(self.shared(torch.tanh(self.embed(x)))))


class Raw(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T)


class Block(nn.Module):
    """A generic module around a layer that the model uses outside of it too."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.shared = shared
        self.scale = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x * self.scale)


class Masked(nn.Module):
    """Attention of torch with a mask (T, T) that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.full((x.shape[1],) * 2, -1e9, dtype=x.dtype), 1)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class Attends(nn.Module):
    """Attention of queries to other keys and values, under masks of both kinds, with or without its weights."""

    def __init__(
        self, *, weights: str = "no", masks: str = "none", keys: int = D, **arguments: object
    ) -> None:
        super().__init__()
        arguments = {"batch_first": True, **arguments}
        self.attention = nn.MultiheadAttention(D, 2, **arguments)
        self.first = bool(arguments["batch_first"])
        self.weights, self.masks, self.keys = weights, masks, keys

    def given(self, x: Tensor) -> dict[str, object]:
        size, width = x.shape[1], x.shape[1] + 1
        forbidden = torch.ones(size, width, dtype=torch.bool).triu(2)
        padding = torch.arange(width) > 2 + (x[:, :1, 0] > 0).long()
        additive = torch.linspace(-1, 1, size * width, dtype=x.dtype).view(size, width)
        return {
            "none": {},
            "boolean": {"attn_mask": forbidden, "key_padding_mask": padding},
            "additive": {"attn_mask": additive},
            "per head": {"attn_mask": torch.stack([additive, -additive]).repeat(len(x), 1, 1)},
            "padding": {"key_padding_mask": padding},
        }[self.masks]

    def forward(self, x: Tensor) -> object:
        keys = torch.tanh(torch.cat((x, x[:, :1]), 1).flip(2))[..., : self.keys]
        tensors = [t if self.first else t.transpose(0, 1) for t in (x, keys, keys * 2)]
        given = {"need_weights": self.weights != "no", "average_attn_weights": self.weights == "average"}
        out, weights = self.attention(*tensors, **given, **self.given(x))
        out = out if self.first else out.transpose(0, 1)
        return out if weights is None else (out, weights)


class WeightsOnly(nn.Module):
    """Only the attention weights reach the loss, and the packed projection is frozen but for its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.attention.in_proj_weight.requires_grad_(False)
        self.head = nn.Linear(T, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, key=x, value=x)[1])


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.attention.in_proj_weight.requires_grad_(False)
        self.attention.in_proj_bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def transformer() -> nn.Module:
    return nn.Transformer(D, 2, 1, 1, 12, dropout=0.0, batch_first=True)


def encoder(*, batch_first: bool = True) -> nn.Module:
    return nn.TransformerEncoderLayer(D, 2, 12, dropout=0.0, batch_first=batch_first)


class PartlyUsed(nn.Module):
    """An unused layer, a frozen layer, a frozen bias and a layer used by a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(D, D).requires_grad_(False)
        self.partial = nn.Linear(D, D)
        self.partial.bias.requires_grad_(False)
        self.norm = nn.LayerNorm(D)
        self.norm.weight.requires_grad_(False)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.partial(torch.tanh(self.frozen(x))))))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList([Positions(), Positions()])
        self.gate = Many()
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.LayerNorm(D)) for _ in "ab"]
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = checkpoint(layer, h, use_reentrant=False)
        return checkpoint(self.gate, h, use_reentrant=False) + checkpoint(
            self.blocks[0], x, use_reentrant=False
        )


def dp_lstm(*, batch_first: bool) -> nn.Module:
    from opacus.layers import DPLSTM

    return DPLSTM(D, 6, num_layers=2, batch_first=batch_first, bidirectional=True)


class Recurrent(nn.Module):
    """A recurrent layer whose outputs and last states are used, from a first state made of the inputs."""

    def __init__(self, build: type, *, first: bool = False, **arguments: object) -> None:
        super().__init__()
        self.batch_first = bool(arguments.get("batch_first"))
        self.inner = build(D, 6, **arguments)
        self.first = first
        self.head = nn.Linear(6 * (2 if self.inner.bidirectional else 1), 3)

    def states(self, x: Tensor) -> object:
        if not self.first:
            return None
        count = self.inner.num_layers * (2 if self.inner.bidirectional else 1)
        lead = torch.arange(1, count + 1, dtype=x.dtype).view(-1, 1, 1)
        h = lead * x[:, 0, : self.inner.proj_size or 6] / 5
        return (h, lead * x[:, 1, :6] / 7) if isinstance(self.inner, nn.LSTM) else h

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        given = x if self.batch_first else x.transpose(0, 1)
        out, last = self.inner(given, self.states(x))
        out = out if self.batch_first else out.transpose(0, 1)
        last = last if isinstance(last, tuple) else (last,)
        mixed = self.head(out) if out.shape[-1] == self.head.in_features else out
        return (mixed, *(s.transpose(0, 1) for s in last))


class Packed(Recurrent):
    """The same on sequences of different lengths, without their padding."""

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        given = x if self.batch_first else x.transpose(0, 1)
        packed = pack_padded_sequence(
            given, lengths.cpu(), batch_first=self.batch_first, enforce_sorted=False
        )
        out, last = self.inner(packed, self.states(x))
        out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        last = last if isinstance(last, tuple) else (last,)
        mixed = self.head(out) if out.shape[-1] == self.head.in_features else out
        return (mixed, *(s.transpose(0, 1) for s in last))


class Cells(nn.Module):
    """A recurrent cell at each position, from no state and from its own."""

    def __init__(self, build: type, **arguments: object) -> None:
        super().__init__()
        self.cell = build(D, 6, **arguments)

    def forward(self, x: Tensor) -> object:
        state = None
        for position in x.unbind(1):
            state = self.cell(position, state)
        return state


class LastState(nn.Module):
    """Only the last state of an LSTM reaches the loss, and some of its weights are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(D, 6, 2, batch_first=True), nn.Linear(6, 3)
        self.lstm.weight_ih_l0.requires_grad_(False)
        self.lstm.bias_hh_l1.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(input=x)[1][1][-1])


class Siamese(nn.Module):
    """Several forward calls of one model before one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = mlp()


def both_towers(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model.tower(x) * model.tower(y)


# -- transformers ---------------------------------------------------------------------------------------------


def gpt2(**changes: object) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=V, n_positions=T, n_embd=D, n_layer=1, n_head=2, n_inner=12, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def checkpointed_gpt2() -> nn.Module:
    model = gpt2()
    with warnings.catch_warnings():  # renamed in transformers 5.23
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def llama(*, tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=T, tie_word_embeddings=tied, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def mixtral(**changes: object) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=V, hidden_size=D, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=T,
        use_cache=False, bos_token_id=0, eos_token_id=0, experts_implementation="eager", **changes,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def qwen_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=V, hidden_size=D, intermediate_size=6, moe_intermediate_size=5, num_hidden_layers=1,
        shared_expert_intermediate_size=7, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=T, use_cache=False,
        bos_token_id=0, eos_token_id=0, experts_implementation="batched_mm",
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config)
    with torch.no_grad():  # routers start at zero: every choice would be a tie
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.normal_()
    return model


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=T, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1,
    )  # fmt: skip
    return BertForMaskedLM(config)


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "embed_tokens"]
    with warnings.catch_warnings():  # peft warns of tied or embedding targets, by the version
        warnings.simplefilter("ignore")
        model = get_peft_model(
            llama(tied=False), LoraConfig(r=3, lora_alpha=8, lora_dropout=0.0, target_modules=targets)
        )
    with torch.no_grad():  # peft starts one factor at zero, which would hide half of the gradients
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


MODES = ("zeros", "reflect", "replicate", "circular")
HALF = 3e-5  # transformers normalises in float32 whatever the dtype of the model

SUBJECTS: dict[str, Subject] = {
    "mlp": Subject(mlp, real(D)),
    "mlp on sequences": Subject(mlp, real(T, D)),
    "mlp on four dimensions": Subject(mlp, real(2, T, D)),
    "norms": Subject(norms, real(2, D)),
    **{f"conv1d {m}": Subject(lambda m=m: conv1d(m), real(4, 9)) for m in MODES},
    **{f"conv2d {m}": Subject(lambda m=m: conv2d(m), real(2, 8, 7)) for m in MODES},
    **{f"conv3d {m}": Subject(lambda m=m: conv3d(m), real(2, 4, 5, 4)) for m in MODES},
    "transposed conv1d": Subject(transposed1d, real(4, 5)),
    "transposed conv2d": Subject(transposed2d, real(2, 4, 3)),
    "transposed conv3d": Subject(transposed3d, real(2, 3, 4, 3)),
    "bilinear": Subject(Bilinears, real(T, D)),
    "bilinear on vectors": Subject(Bilinears, real(D)),
    "bags": Subject(Bags, ids),
    "batch-first layers, sequence first": Subject(
        SequenceFirst, lambda n: (torch.randn(T, n, D, dtype=torch.float64),), sequence_first, batch_dim=1
    ),
    "layer used twice": Subject(Twice, ids),
    "padding_idx": Subject(Padded, ids),
    "positions of shape (1, T)": Subject(Positions, ids),
    "keywords and raw parameters": Subject(
        ByKeyword,
        lambda n: {
            "hidden": torch.randn(n, T, D, dtype=torch.float64),
            "scale": torch.randn(n, T, dtype=torch.float64),
        },
    ),
    "generic modules": Subject(Generics, real(D)),
    "generic modules on sequences": Subject(Generics, real(T, D)),
    "tied through a generic module": Subject(TiedGeneric, ids),
    "attention with a shared mask": Subject(Masked, real(T, D)),
    "attention to other keys": Subject(Attends, real(T, D)),
    "attention, boolean masks": Subject(
        lambda: Attends(masks="boolean", weights="average", bias=False), real(T, D)
    ),
    "attention, additive mask": Subject(
        lambda: Attends(masks="additive", weights="each", batch_first=False), real(T, D)
    ),
    "attention, padding": Subject(lambda: Attends(masks="padding", add_zero_attn=True), real(T, D)),
    "attention, mask per head": Subject(
        lambda: Attends(masks="per head", add_bias_kv=True, add_zero_attn=True, batch_first=False), real(T, D)
    ),
    "attention, other widths": Subject(
        lambda: Attends(keys=3, kdim=3, vdim=3, weights="each", add_bias_kv=True), real(T, D)
    ),
    "attention, weights only": Subject(WeightsOnly, real(T, D)),
    "attention, causal": Subject(Causal, real(T, D)),
    "transformer": Subject(
        transformer, lambda n: (*real(T, D)(n), *real(3, D)(n)), call=lambda m, x, y: m(x, y)
    ),
    "encoder layer": Subject(encoder, real(T, D)),
    "encoder layer, sequence first": Subject(
        lambda: encoder(batch_first=False),
        lambda n: (torch.randn(T, n, D, dtype=torch.float64),),
        sequence_first,
        batch_dim=1,
    ),
    "partly used and frozen": Subject(PartlyUsed, real(D)),
    "checkpointed": Subject(Checkpointed, ids),
    "values for all examples": Subject(ForAll, ids),
    "several forward calls": Subject(Siamese, lambda n: (*real(D)(n), *real(D)(n)), call=both_towers),
    "DPLSTM": Subject(
        lambda: dp_lstm(batch_first=True), real(T, D), lambda out: squares(out[0]), call=lambda m, x: m(x)
    ),
    "DPLSTM, sequence first": Subject(
        lambda: dp_lstm(batch_first=False),
        lambda n: (torch.randn(T, n, D, dtype=torch.float64),),
        sequence_first,
        batch_dim=1,
    ),
    "LSTM": Subject(lambda: Recurrent(nn.LSTM, batch_first=True), real(T, D)),
    "LSTM, stacked both ways": Subject(
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, first=True), real(T, D)
    ),
    "LSTM, projected": Subject(
        lambda: Recurrent(
            nn.LSTM, num_layers=2, proj_size=3, batch_first=True, bidirectional=True, first=True
        ),
        real(T, D),
    ),
    "LSTM, last state": Subject(LastState, real(T, D)),
    "LSTM, one position": Subject(lambda: Recurrent(nn.LSTM, bias=False), real(1, D)),
    "LSTM, sequence first": Subject(
        lambda: nn.LSTM(D, 6, 2),
        lambda n: (torch.randn(T, n, D, dtype=torch.float64),),
        lambda out: squares((out[0].transpose(0, 1), *(s.transpose(0, 1) for s in out[1]))),
        batch_dim=1,
    ),
    "GRU": Subject(lambda: Recurrent(nn.GRU, first=True), real(T, D)),
    "GRU, stacked both ways": Subject(
        lambda: Recurrent(nn.GRU, num_layers=3, batch_first=True, bidirectional=True, bias=False), real(T, D)
    ),
    "RNN, tanh": Subject(lambda: Recurrent(nn.RNN, num_layers=2, first=True, bidirectional=True), real(T, D)),
    "RNN, relu": Subject(lambda: Recurrent(nn.RNN, nonlinearity="relu", batch_first=True), real(T, D)),
    "LSTM, packed, stacked both ways": Subject(
        lambda: Packed(nn.LSTM, num_layers=2, bidirectional=True, first=True), uneven
    ),
    "LSTM, packed and projected": Subject(
        lambda: Packed(nn.LSTM, num_layers=2, proj_size=3, batch_first=True, bidirectional=True), uneven
    ),
    "GRU, packed both ways": Subject(
        lambda: Packed(nn.GRU, num_layers=2, batch_first=True, bidirectional=True, first=True), uneven
    ),
    "LSTM cell": Subject(lambda: Cells(nn.LSTMCell), real(T, D)),
    "GRU cell": Subject(lambda: Cells(nn.GRUCell, bias=False), real(T, D)),
    "RNN cells": Subject(lambda: Cells(nn.RNNCell, nonlinearity="relu"), real(T, D)),
    "GPT-2": Subject(gpt2, input_ids, tokens_loss),
    "GPT-2, checkpointed": Subject(checkpointed_gpt2, input_ids, tokens_loss),
    "Llama, tied": Subject(lambda: llama(tied=True), input_ids, tokens_loss, rtol=HALF),
    "Llama, untied": Subject(lambda: llama(tied=False), input_ids, tokens_loss, rtol=HALF),
    "Mixtral": Subject(mixtral, input_ids, tokens_loss, rtol=HALF),
    "Qwen2-MoE": Subject(qwen_moe, input_ids, tokens_loss, rtol=HALF),
    "BERT": Subject(bert, input_ids, tokens_loss),
    "LoRA": Subject(lora, input_ids, tokens_loss, rtol=HALF),
}


def clippers(model: nn.Module, clip_norm: float) -> dict[str, object]:
    num_parameters = sum(p.requires_grad for p in model.parameters())
    return {
        "flat": FlatClipper(clip_norm),
        "per_layer": per_layer(model, clip_norm),
        "per_parameter": per_parameter(model, [clip_norm / 4] * num_parameters),
    }


class Recorder:
    """A tape with a clipped sum behind it: what the private step does, without the step."""

    def __init__(
        self,
        model: nn.Module,
        clipper: object,
        *,
        batch_dim: int = 0,
        mean: bool = False,
        two_pass: bool = False,
        costs: Costs = DEFAULT,
    ) -> None:
        self.sizes: list[int] = []
        self.tape = Tape(model, self.begin, batch_dim=batch_dim)
        self.sums = Sums(Contribution(clipper), clipper.groups(list(self.tape.parameters)), mean, costs)
        self.two_pass = two_pass
        self.first: Measuring | None = None

    def begin(self, idle: object) -> object:
        if not self.two_pass:
            return Clipping(self.sums, idle, self.admit)
        if self.first is None or not self.first.done:
            self.first = Measuring(self.sums)
            return self.first
        first, self.first = self.first, None
        return Summing(self.sums, first, self.admit)

    def admit(self, num_examples: int | None) -> None:
        self.sizes.extend(() if num_examples is None else (num_examples,))

    def backward(self, loss: Tensor) -> None:
        """One backward, or two of one graph."""
        if self.two_pass:
            loss.backward(retain_graph=True)
        loss.backward()

    def __enter__(self) -> Recorder:
        self.tape.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.tape.detach()

    def total(self) -> dict[str, Tensor]:
        """The clipped sum of all parameters, zero where no example reached."""
        return {n: self.sums.totals.get(n, torch.zeros_like(p)) for n, p in self.tape.parameters.items()}


def example_gradients(subject: Subject, model: nn.Module, inputs: tuple | dict, num_examples: int) -> list:
    """The oracle: the gradient of each example by a loop of plain autograd."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = []
    for index in range(num_examples):
        loss = subject.run(model, subject.take(inputs, torch.tensor([index])))
        grads = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
        found.append(
            {
                n: torch.zeros_like(p) if g is None else g.detach()
                for (n, p), g in zip(parameters.items(), grads, strict=True)
            }
        )
    return found


def clipped_by_hand(gradients: list, clipper: object) -> dict[str, Tensor]:
    """The textbook: each example's gradient scaled within each group, then summed."""
    groups = clipper.groups(list(gradients[0]))
    bounds = getattr(clipper, "clip_norms", None) or (clipper.clip_norm,)
    total = {name: torch.zeros_like(value) for name, value in gradients[0].items()}
    for gradient in gradients:
        for names, bound in zip(groups, bounds, strict=True):
            norm = sum(gradient[name].square().sum() for name in names) ** 0.5
            for name in names:
                total[name] += gradient[name] * min(1.0, bound / float(norm)) if norm > 0 else 0
    return total
