# SPDX-License-Identifier: Apache-2.0
"""What the partitions put into one group, on small models of every kind they are meant for."""

import warnings

import pytest
import torch
from torch import nn

from clipping import (
    AutomaticClipper,
    FlatClipper,
    PerSampleAdaptiveClipper,
    by_component,
    named_clipper,
    per_adapter,
    per_block,
    per_layer,
    per_parameter,
)


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=2, n_embd=8, vocab_size=11, n_positions=8))


def tiny_llama(*, tied=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=8,
            intermediate_size=12, vocab_size=11, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def adapted(model, **options):
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", **options))


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)))


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def assert_partition(clipper, model, sensitivity):
    assert clipper.groups(trainable(model)) == clipper.members
    assert all(clipper.members) and clipper.sensitivity == pytest.approx(sensitivity, rel=1e-12)
    assert len(set(clipper.clip_norms)) == 1


def test_per_layer_groups_by_module_and_leaves_out_frozen_parameters():
    frozen = mlp()
    frozen[0].requires_grad_(False)
    assert per_layer(frozen, 1.0).members == (("2.0.weight", "2.0.bias"), ("2.1.weight", "2.1.bias"))
    names = trainable(mlp())[2:]
    assert per_parameter(frozen, [1.0] * 4).members == tuple((n,) for n in names)


def test_per_block_of_gpt2_with_a_tied_head():
    model = tiny_gpt2()
    clipper = per_block(model, 0.5)
    assert_partition(clipper, model, 0.5)
    before, *blocks, after = clipper.members
    assert before == ("transformer.wte.weight", "transformer.wpe.weight")
    assert after == ("transformer.ln_f.weight", "transformer.ln_f.bias")
    assert len(blocks) == 3
    for number, names in enumerate(blocks):
        assert len(names) == 12 and all(name.startswith(f"transformer.h.{number}.") for name in names)


@pytest.mark.parametrize("tied", [False, True])
def test_per_block_of_llama(tied):
    model = tiny_llama(tied=tied)
    clipper = per_block(model, 2.0, rule=PerSampleAdaptiveClipper)
    assert_partition(clipper, model, 2.0)
    assert clipper.members[0] == ("model.embed_tokens.weight",)
    assert clipper.members[-1] == ("model.norm.weight",) + (() if tied else ("lm_head.weight",))
    assert [len(names) for names in clipper.members[1:-1]] == [9, 9]
    assert all(type(rule) is PerSampleAdaptiveClipper for rule in clipper.clippers)


def test_per_block_of_a_named_list_and_of_a_model_that_is_the_list():
    model = nn.ModuleDict({"after": nn.Linear(2, 2), "odd": mlp(), "stack": nn.ModuleList([nn.Linear(2, 2)])})
    assert per_block(model, 1.0, blocks="odd").members == (
        ("after.weight", "after.bias"),
        ("odd.0.weight", "odd.0.bias"),
        ("odd.2.0.weight", "odd.2.0.bias", "odd.2.1.weight", "odd.2.1.bias"),
        ("stack.0.weight", "stack.0.bias"),
    )
    stack = nn.Sequential()
    stack.add_module("before", nn.Linear(2, 2))
    stack.add_module("after", nn.Linear(2, 2))
    assert len(per_block(stack, 1.0).members) == 2


def test_per_block_looks_for_blocks_that_train():
    model = nn.ModuleDict(
        {"body": nn.ModuleList([nn.Linear(9, 9) for _ in range(2)]), "heads": nn.ModuleList()}
    )
    model["heads"].extend([nn.Linear(2, 2), nn.Linear(2, 2)])
    model["body"].requires_grad_(False)
    assert [names[0] for names in per_block(model, 1.0).members] == ["heads.0.weight", "heads.1.weight"]
    with pytest.raises(
        ValueError, match=r"trainable parameters; got 'body', which holds none; name another list"
    ):
        per_block(model, 1.0, blocks="body")
    with pytest.raises(
        ValueError, match=r"an nn.ModuleList or nn.Sequential of blocks; got 'boby'; this model has"
    ):
        per_block(model, 1.0, blocks="boby")
    for none in (mlp(), nn.Linear(2, 2), model["body"]):
        with pytest.raises(ValueError, match=r"of trainable blocks of one type; got none; name the list"):
            per_block(none, 1.0)


def test_per_block_of_a_model_with_adapters():
    model = adapted(tiny_gpt2())
    clipper = per_block(model, 1.0)
    assert_partition(clipper, model, 1.0)
    assert [len(names) for names in clipper.members] == [8, 8, 8]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_per_adapter_joins_the_matrices_of_one_layer(options):
    model = adapted(tiny_llama(), **options)
    clipper = per_adapter(model, 1.0)
    assert_partition(clipper, model, 1.0)
    assert len(clipper.members) == 2 * 7
    for names in clipper.members:
        parts = [name.rsplit(".lora_", 1) for name in names]
        assert len({layer for layer, _ in parts}) == 1
        assert [part.partition(".")[0] for _, part in parts] == [
            "A",
            "B",
            *(["magnitude_vector"] if options else []),
        ]


def test_per_adapter_with_other_layers_and_without_adapters():
    model = adapted(tiny_gpt2(), modules_to_save=["ln_f"])
    others = [names for names in per_adapter(model, 1.0).members if ".lora_" not in names[0]]
    assert len(others) == 1 and len(others[0]) == 2
    with pytest.raises(
        ValueError, match=r"trainable LoRA adapters; got none; add them with peft.get_peft_model"
    ):
        per_adapter(tiny_gpt2(), 1.0)
    named = named_clipper("per_adapter:automatic", model, 0.5)
    assert type(named.clippers[0]) is AutomaticClipper and named.sensitivity == pytest.approx(0.5)


def test_by_component_gives_each_pattern_its_own_norm():
    clipper = by_component(adapted(tiny_gpt2()), {"*.lora_B.*": 1.0, "*.lora_A.*": 0.25}, rule=FlatClipper)
    found = dict(zip(clipper.clip_norms, clipper.members, strict=True))
    assert set(found) == {1.0, 0.25} and clipper.sensitivity == pytest.approx(17**0.5 / 4)
    assert all(".lora_A." in name for name in found[0.25]) and all(".lora_B." in name for name in found[1.0])


@pytest.mark.parametrize(("patterns", "message"), [
    ({"*.weight": 1.0}, r"exactly one; got '0.bias', which matches none \(3 such parameters\); narrow"),
    ({"*": 1.0, "0.*": 1.0}, r"exactly one; got '0.weight', which matches \['\*', '0.\*'\] \(2 such"),
    ({"*": 1.0, "3.*": 1.0}, r"each match a trainable parameter; got \['3.\*'\], which match none; correct"),
])  # fmt: skip
def test_by_component_refuses_patterns_that_do_not_partition(patterns, message):
    with pytest.raises(ValueError, match=message):
        by_component(mlp(), patterns)


def test_every_rule_clips_inside_its_groups():
    model, norms = mlp(), torch.tensor([1e-3, 1.0, 1e3])
    for rule in (FlatClipper, AutomaticClipper, PerSampleAdaptiveClipper):
        clipper = per_layer(model, 0.9, rule=rule)
        for group, bound in enumerate(clipper.clip_norms):
            assert torch.equal(clipper.weights(norms, group), rule(bound).weights(norms))
