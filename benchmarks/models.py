# SPDX-License-Identifier: Apache-2.0
"""The models that steps are timed on: random weights, one fixed batch, one loss per example.

Every variant of a model runs the same batch, the same per-example loss and the same fused AdamW.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpopt import causal_lm_losses

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Task:
    """A model, its batch (keyword arguments, or one tensor under "x"), labels, and losses (B,) of an output.

    `expanded` are inputs to add for a library that cannot run broadcast position ids. `autocast` is the dtype in which
    the forward runs its products; None: that of the weights.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    labels: Tensor
    losses: Callable[[object, Tensor], Tensor]
    expanded: dict[str, Tensor] = field(default_factory=dict)
    autocast: torch.dtype | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return self.labels.shape[0]

    def forward(self, model: nn.Module, *, expand: bool = False) -> object:
        """The output of `model`, this task's model or a wrapper of it."""
        device = self.labels.device.type
        with torch.autocast(device, self.autocast) if self.autocast else nullcontext():
            if "x" in self.inputs:
                return model(self.inputs["x"])
            return model(**self.inputs, **(self.expanded if expand else {}))

    def on(self, device: str, autocast: torch.dtype | None = None) -> Task:
        """The same task with model and batch on `device`, its forward under autocast to `autocast`."""
        moved = ({name: x.to(device) for name, x in some.items()} for some in (self.inputs, self.expanded))
        inputs, expanded = moved
        return replace(
            self, model=self.model.to(device), inputs=inputs, labels=self.labels.to(device), expanded=expanded,
            autocast=autocast,
        )  # fmt: skip


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    """The fused AdamW of every variant, over the trainable parameters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)


def _next_token_losses(output: object, labels: Tensor) -> Tensor:
    return causal_lm_losses(output.logits, labels)  # pyright: ignore[reportAttributeAccessIssue]


def _class_losses(output: object, labels: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits  # pyright: ignore[reportAttributeAccessIssue]
    return F.cross_entropy(logits, labels, reduction="none")


def _tokens(batch_size: int, num_tokens: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (batch_size, num_tokens), generator=torch.Generator().manual_seed(1))


def _language(model: nn.Module, batch_size: int, num_tokens: int, *, positions: bool) -> Task:
    tokens = _tokens(batch_size, num_tokens, model.config.vocab_size)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    expanded = {"position_ids": torch.arange(num_tokens).repeat(batch_size, 1)} if positions else {}
    return Task(model, {"input_ids": tokens}, tokens, _next_token_losses, expanded)


def _gpt2(**settings: object) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(use_cache=False, **tokens, **dropout, **settings))  # pyright: ignore[reportArgumentType]


def gpt2_like() -> Task:
    """GPT-2 of 6 layers, width 384, vocabulary 8192, head untied; B 16, T 128."""
    model = _gpt2(
        n_layer=6, n_head=6, n_embd=384, vocab_size=8192, n_positions=128, tie_word_embeddings=False
    )
    return _language(model, 16, 128, positions=True)


def gpt2_small() -> Task:
    """GPT-2 small, 124 million parameters, head tied; B 4, T 128."""
    return _language(_gpt2(), 4, 128, positions=True)


def gpt2_lora() -> Task:
    """LoRA of rank 8 on the attention of GPT-2 small; B 4, T 128."""
    from peft import LoraConfig, get_peft_model

    base = _gpt2()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], lora_dropout=0.0, fan_in_fan_out=True)
    return replace(_language(base, 4, 128, positions=True), model=get_peft_model(base, config))  # pyright: ignore[reportArgumentType]


def bert_like() -> Task:
    """BERT of 6 layers, width 384, vocabulary 8192, two classes; B 32, T 64."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    tokens = _tokens(32, 64, 8192)
    expanded = {
        "position_ids": torch.arange(64).repeat(32, 1),
        "token_type_ids": torch.zeros(32, 64, dtype=torch.long),
    }
    labels = torch.arange(32) % 2
    return Task(BertForSequenceClassification(config), {"input_ids": tokens}, labels, _class_losses, expanded)


def llama_like() -> Task:
    """Llama of 4 layers, width 256, grouped queries, vocabulary 4096, head untied; B 16, T 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return _language(LlamaForCausalLM(config), 16, 128, positions=False)


def _images(model: nn.Module, x: Tensor) -> Task:
    return Task(model, {"x": x}, torch.arange(x.shape[0]) % 10, _class_losses)


def mlp() -> Task:
    """784-1024-1024-10 with ReLU; B 256."""
    model = nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )
    return _images(model, torch.randn(256, 784))


def mlp_tiny() -> Task:
    """16-32-10; B 8. For tests of these scripts only."""
    return _images(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)), torch.randn(8, 16))


def cnn() -> Task:
    """Three 3x3 convolutions (32, 64, 128 channels) with GroupNorm on 32x32 images, then a linear head; B 64."""
    layers: list[nn.Module] = []
    for num_in, num_out, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2)):
        layers += [nn.Conv2d(num_in, num_out, 3, stride, 1), nn.GroupNorm(8, num_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return _images(model, torch.randn(64, 3, 32, 32))


MODELS: dict[str, Callable[[], Task]] = {
    "gpt2-like": gpt2_like,
    "gpt2-small": gpt2_small,
    "bert-like": bert_like,
    "gpt2-lora": gpt2_lora,
    "mlp": mlp,
    "cnn": cnn,
    "llama-like": llama_like,
    "mlp-tiny": mlp_tiny,
}


SCALED = "scaled/"
"""Prefix of models given by their sizes: "scaled/8,128,2,128"."""


class Scale(NamedTuple):
    """Sizes of a GPT-2-shaped model and its batch."""

    batch: int
    tokens: int
    layers: int
    width: int

    def __str__(self) -> str:
        """As `scaled` reads it."""
        return ",".join(str(size) for size in self)


def scaled(sizes: str) -> Task:
    """GPT-2 of these sizes, heads of width 32, vocabulary 1024, head untied."""
    scale = Scale(*(int(size) for size in sizes.split(",")))
    model = _gpt2(
        n_layer=scale.layers, n_head=scale.width // 32, n_embd=scale.width, vocab_size=1024,
        n_positions=scale.tokens, tie_word_embeddings=False,
    )  # fmt: skip
    return _language(model, scale.batch, scale.tokens, positions=True)


def build(name: str) -> Task:
    """The task `name` with the same random weights and batch each time."""
    torch.manual_seed(0)
    return scaled(name.removeprefix(SCALED)) if name.startswith(SCALED) else MODELS[name]()
