# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT on the transformers of `subjects`, each with every factor away from its start at zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import peft
import torch
from torch import nn

from tests.support.clipping.subjects import HALF, Subject, gpt2, input_ids, llama, tokens_loss

QV = ["q_proj", "v_proj"]


def adapted(build: Callable[[], nn.Module], config: peft.PeftConfig) -> nn.Module:
    with warnings.catch_warnings():  # of tied or embedding targets, by the version
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(build(), config)
    return moved(model)


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(
                    parameter + torch.randn_like(parameter) * (0.1 if "magnitude" in name else 0.3)
                )
    return model


def untied() -> nn.Module:
    return llama(tied=False)


def two_adapters() -> nn.Module:
    """Two adapters at work at once, and a third that is not."""
    model = adapted(untied, peft.LoraConfig(r=2, target_modules=QV))
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["k_proj", *QV]))
    model.add_adapter("idle", peft.LoraConfig(r=2, target_modules=QV))
    model.base_model.set_adapter(["default", "second"])
    return moved(model)


def convolved() -> nn.Module:
    base = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))


def lora(build: Callable[[], nn.Module] = untied, **arguments: object) -> Callable[[], nn.Module]:
    return lambda: adapted(build, peft.LoraConfig(r=2, **{"target_modules": QV, **arguments}))


def other(config: type, **arguments: object) -> Callable[[], nn.Module]:
    return lambda: adapted(untied, config(**arguments))


BUILT = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True),
    "LoRA on Conv1D": lora(gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    "LoRA on embeddings": lora(target_modules=["embed_tokens"]),
    "LoRA with biases": lora(lora_bias=True),
    "LoRA, base biases too": lora(gpt2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
    "LoRA, head saved": lora(modules_to_save=["lm_head"]),
    "LoRA, new tokens": lora(trainable_token_indices=[1, 3]),
    "LoRA, two adapters": two_adapters,
    "DoRA": lora(use_dora=True),
    "DoRA on Conv1D": lora(gpt2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True),
    "DoRA on embeddings": lora(target_modules=["embed_tokens"], use_dora=True),
    "IA3": other(peft.IA3Config, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "AdaLoRA": other(
        peft.AdaLoraConfig, r=2, init_r=3, total_step=10, tinit=1, tfinal=1, target_modules=QV
    ),
    "VeRA": other(peft.VeraConfig, r=3, target_modules=QV),
    "OFT": other(peft.OFTConfig, oft_block_size=4, target_modules=["q_proj"]),
    "BOFT": other(peft.BOFTConfig, boft_block_size=4, target_modules=["q_proj"]),
    "layer norms": other(peft.LNTuningConfig, target_modules=["input_layernorm"]),
    "prefix tuning": other(peft.PrefixTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=2),
    "prompt tuning": other(peft.PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=2),
    "p-tuning": other(
        peft.PromptEncoderConfig, task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=6
    ),
    "p-tuning by an LSTM": other(
        peft.PromptEncoderConfig, task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=6,
        encoder_reparameterization_type="LSTM", encoder_dropout=0.0,
    ),
    "LoHa": other(peft.LoHaConfig, r=2, target_modules=["q_proj"]),
    "LoKr": other(peft.LoKrConfig, r=2, target_modules=["q_proj"]),
}  # fmt: skip

ADAPTED = {
    **{name: Subject(build, input_ids, tokens_loss, rtol=HALF) for name, build in BUILT.items()},
    "LoRA on Conv2d": Subject(convolved, lambda n: (torch.randn(n, 2, 5, 4, dtype=torch.float64),)),
}
