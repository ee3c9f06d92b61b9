# SPDX-License-Identifier: Apache-2.0
"""What a record looks like to the model depends on that record alone."""

from pathlib import Path

import pytest
import torch

from dpopt.finetune.evaluation import mean_loss
from dpopt.finetune.language_model import collate, encode, load, logits, with_adapter
from dpopt.finetune.record_files import InputError, TextRecord
from dpopt.losses import causal_lm_losses

CPU = torch.device("cpu")
TEXTS = ("ba", "do ki lu", "me no ba do ki lu me no")


@pytest.fixture(scope="module")
def loaded(tiny_model: Path):
    return load(str(tiny_model))


def test_guarantee_a_records_loss_does_not_depend_on_its_batch(loaded) -> None:
    model, tokenizer = loaded
    records = encode([TextRecord("", text) for text in TEXTS], tokenizer, max_tokens=32)

    def losses(batch):
        tokens = collate(batch, pad=0, device=CPU)
        return causal_lm_losses(logits(model, tokens), tokens.labels)

    together = losses(records)
    alone = torch.cat([losses([record]) for record in records])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_records_are_cut_and_ended(loaded) -> None:
    _, tokenizer = loaded
    short, long = encode([TextRecord("", "ba"), TextRecord("", "ba" * 30)], tokenizer, max_tokens=10)
    assert short.ids.tolist()[-1] == tokenizer.eos_token_id
    assert len(short.ids) == 3
    assert len(long.ids) == 10
    assert tokenizer.eos_token_id not in long.ids.tolist()


def test_prompts_and_padding_carry_no_loss(loaded) -> None:
    _, tokenizer = loaded
    records = encode([TextRecord("ba:", "do"), TextRecord("", "me no ba")], tokenizer, max_tokens=32)
    tokens = collate(records, pad=0, device=CPU)
    counted = (tokens.labels != -100).sum(1).tolist()
    assert counted == [len("do") + 1, len("me no ba") + 1]
    assert tokens.labels[0, 3:6].tolist() == records[0].ids[3:].tolist()
    assert tokens.attention_mask.sum(1).tolist() == [6, 9]


def test_the_held_out_loss_does_not_depend_on_the_batches(loaded) -> None:
    model, tokenizer = loaded
    records = encode([TextRecord("", text) for text in TEXTS], tokenizer, max_tokens=32)
    model.train()
    one, all_ = (mean_loss(model, records, batch_size=size, pad=0, device=CPU) for size in (1, 3))
    assert one == pytest.approx(all_, rel=1e-5)
    assert model.training


def test_adapters_alone_are_trained(tiny_model: Path) -> None:
    model = with_adapter(load(str(tiny_model))[0], 2)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)


def test_models_that_cannot_be_loaded_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"expected a folder with a config.json at .*; got none; pass a folder"
    ):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"expected a causal language model called .*; pass a local folder"):
        load(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"called 'nobody/nothing' \(HF_HUB_OFFLINE is set\); got: .*; pass"):
        load("nobody/nothing")
