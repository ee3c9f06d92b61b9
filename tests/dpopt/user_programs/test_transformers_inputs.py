# SPDX-License-Identifier: Apache-2.0
"""Models of transformers that take images, sounds or few tokens, as they are, in both doors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from tests.support.dpopt.private_runs import explicit, familiar

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
NUM = 4


def vision(kind, config, **numbers):
    made = config(image_size=16, patch_size=8, num_labels=2, **SMALL, **numbers)
    return lambda: kind(made)


def convnext():
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, num_labels=2, layer_scale_init_value=0.5
    )
    return transformers.ConvNextForImageClassification(config)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=13, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_labels=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4, max_source_positions=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, classifier_proj_size=8,
    )  # fmt: skip
    return transformers.WhisperForAudioClassification(config)


def llama():
    config = transformers.LlamaConfig(vocab_size=6, num_labels=2, pad_token_id=0, **SMALL)
    return transformers.LlamaForSequenceClassification(config)


IMAGES, SOUNDS = ("pixel_values", (3, 16, 16)), ("input_features", (4, 16))
MODELS = {
    "ViT": (vision(transformers.ViTForImageClassification, transformers.ViTConfig), *IMAGES),
    "DeiT": (vision(transformers.DeiTForImageClassification, transformers.DeiTConfig), *IMAGES),
    "DINOv2": (vision(transformers.Dinov2ForImageClassification, transformers.Dinov2Config), *IMAGES),
    "ConvNeXt": (convnext, "pixel_values", (3, 32, 32)),
    "Whisper": (whisper, *SOUNDS),
    "Llama of six tokens": (llama, "input_ids", (5,)),
}


def rows(shape, key):
    generator = torch.Generator().manual_seed(0)
    if key == "input_ids":
        return torch.randint(1, 6, (NUM, *shape), generator=generator)
    return torch.randn(NUM, *shape, generator=generator)


def losses_of(model, key, inputs, labels):
    return F.cross_entropy(model(**{key: inputs}).logits, labels, reduction="none")


def by_hand(model, key, inputs, labels, clip):
    model = copy.deepcopy(model)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(inputs, labels, strict=True):
        model.zero_grad()
        losses_of(model, key, x[None], y[None]).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norm = torch.sqrt(sum(g.square().sum() for g in found.values()))
        for name, g in found.items():
            total[name] += g * min(1.0, clip / float(norm)) / NUM
    return total


def assert_close(model, expected):
    for name, p in model.named_parameters():
        assert (p.grad is None) is not p.requires_grad  # Whisper's positions are frozen
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_other_inputs_trains_in_both_doors(name):
    build, key, shape = MODELS[name]
    torch.manual_seed(0)
    model = build()
    inputs, labels = rows(shape, key), torch.arange(NUM) % 2
    expected = by_hand(model, key, inputs, labels, 0.5)
    twin = copy.deepcopy(model)
    with explicit(model, expected=float(NUM), clip=0.5) as private:
        for _ in private.batches(list(inputs), steps=1):
            private.accumulate(losses_of(model, key, inputs, labels))
            private.release()
    assert_close(model, expected)
    engine, twin, optimizer, loader = familiar(
        twin, TensorDataset(inputs, labels), batch_size=NUM, max_grad_norm=0.5, example_inputs={key: inputs}
    )
    for x, y in loader:
        losses_of(twin, key, x, y).mean().backward()
        optimizer.step()
    assert_close(twin, expected)
    engine.detach()
