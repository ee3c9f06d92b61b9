# SPDX-License-Identifier: Apache-2.0
"""The models of the device benchmark: public shapes, random weights, a fixed number of tokens a batch.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.models import Task, _gpt2, _language

TOKENS = 16384
"""B * T for GPT-2; a quarter of it for the Llama shape."""


@dataclass(frozen=True)
class Cell:
    """One setting: a model, T, and the dtype of the products ("fp32", or "bf16" for autocast)."""

    model: str
    tokens: int
    dtype: str

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model}, T {self.tokens}, {self.dtype}"


def _lora(model: nn.Module, targets: list[str], *, transposed: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=targets, lora_dropout=0.0, fan_in_fan_out=transposed
    )
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType, reportReturnType]


def _gpt2_task(num_tokens: int, **settings: int) -> Task:
    model = _gpt2(n_positions=num_tokens, **settings)
    return _language(model, max(1, TOKENS // num_tokens), num_tokens, positions=True)


def _llama_task(num_tokens: int) -> Task:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=num_tokens, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return _language(LlamaForCausalLM(config), max(1, TOKENS // 4 // num_tokens), num_tokens, positions=False)


def _tiny_task(num_tokens: int) -> Task:
    model = _gpt2(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=num_tokens)
    return _language(model, 4, num_tokens, positions=True)


def _with_lora(task: Task, targets: list[str], *, transposed: bool) -> Task:
    return replace(task, model=_lora(task.model, targets, transposed=transposed))


SHAPES: dict[str, Callable[[int], Task]] = {
    "gpt2": _gpt2_task,
    "gpt2-medium": lambda num_tokens: _gpt2_task(num_tokens, n_layer=24, n_head=16, n_embd=1024),
    "gpt2 LoRA": lambda num_tokens: _with_lora(_gpt2_task(num_tokens), ["c_attn"], transposed=True),
    "llama-1b": _llama_task,
    "llama-1b LoRA": lambda num_tokens: _with_lora(
        _llama_task(num_tokens), ["q_proj", "k_proj", "v_proj", "o_proj"], transposed=False
    ),
    "tiny": _tiny_task,
}
DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}

CELLS = (
    Cell("gpt2", 1024, "bf16"),
    Cell("llama-1b LoRA", 1024, "bf16"),
    Cell("gpt2", 512, "bf16"),
    Cell("llama-1b", 1024, "bf16"),
    Cell("gpt2", 1024, "fp32"),
    Cell("gpt2-medium", 1024, "bf16"),
    Cell("gpt2", 2048, "bf16"),
    Cell("gpt2 LoRA", 1024, "bf16"),
    Cell("llama-1b", 2048, "bf16"),
    Cell("gpt2", 4096, "bf16"),
    Cell("llama-1b", 4096, "bf16"),
    Cell("gpt2", 512, "fp32"),
    Cell("gpt2-medium", 512, "bf16"),
    Cell("gpt2", 2048, "fp32"),
    Cell("gpt2-medium", 2048, "bf16"),
    Cell("llama-1b", 512, "bf16"),
    Cell("gpt2-medium", 1024, "fp32"),
    Cell("gpt2-medium", 4096, "bf16"),
    Cell("gpt2", 4096, "fp32"),
)
"""The most telling first: what the time does not reach is left out by name."""

TINY = (Cell("tiny", 8, "fp32"), Cell("tiny", 8, "bf16"))


def made(cell: Cell, device: str) -> Task:
    """The task of `cell` on `device`, the same weights and batch each time."""
    torch.manual_seed(0)
    return SHAPES[cell.model](cell.tokens).on(device, DTYPES[cell.dtype])
