# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpopt.finetune import FinetuneConfig

SYLLABLES = ("ba", "do", "ki", "lu", "me", "no")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 6,000 parameters and a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    characters = "abcdefghijklmnopqrstuvwxyz .,:|0123456789"
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=2,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder
    )
    return folder


def sentence(number: int) -> str:
    return " ".join(SYLLABLES[(number * k + k) % 6] for k in range(1, 4 + number % 5)) + f" {number}"


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(i)}) + "\n" for i in range(60)))
    return path


@pytest.fixture
def validation_file(tmp_path: Path) -> Path:
    path = tmp_path / "validation.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(i)}) + "\n" for i in range(100, 110)))
    return path


@pytest.fixture
def config(tiny_model: Path, train_file: Path, tmp_path: Path):
    """A function that makes a configuration of four quick steps, with changes."""

    def make(**changes) -> FinetuneConfig:
        settings = {
            "model": str(tiny_model),
            "train": (train_file,),
            "steps": 4,
            "batch_size": 12,
            "physical_batch_size": 5,
            "accountant": "rdp",
            "out": tmp_path / "out",
        }
        return FinetuneConfig(**(settings | changes))

    return make
