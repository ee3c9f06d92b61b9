# SPDX-License-Identifier: Apache-2.0
"""The shipped model: loads offline, is small, predicts public text, and says where it comes from."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpopt import embedded
from dpopt.embedded import MODEL_PATH, model_path

SNIPPET = """copy(src, dst)

Copy the contents of the file named src to a file named dst and return the path of the new file.

If the destination is a directory, the file is created in it. If the file does not exist, an OSError is raised.
"""


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_path())


def test_the_folder_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL_PATH.iterdir()}
    assert sum(sizes.values()) <= 8_000_000, sizes
    assert {"config.json", "model.safetensors", "tokenizer.json", "PROVENANCE.json"} <= sizes.keys()


def test_the_tokenizer_is_lossless_and_has_its_special_tokens(tokenizer) -> None:
    text = "norm(x, ord)\n\n    \u03b1 \u2264 1 \U0001f40d  Return  the norm.\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(set(special)) == 3
    assert None not in special


def test_the_model_matches_its_tokenizer(model, tokenizer) -> None:
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert 900_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_200_000
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_model_predicts_documentation(model, tokenizer) -> None:
    ids = tokenizer(SNIPPET, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    loss = cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert loss < 0.6 * math.log(model.config.vocab_size)


def test_the_model_generates(model, tokenizer) -> None:
    ids = tokenizer("open(file, mode)\n\n", return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert made.shape[1] > ids["input_ids"].shape[1]


def test_provenance_names_the_text_and_nobody() -> None:
    text = (MODEL_PATH / "PROVENANCE.json").read_text()
    told = json.loads(text)
    losses = told["phases"][-1]["losses"]
    assert losses["public_held_out_docstrings"] < losses["private_validation_records"]
    assert str(Path.home()) not in text


def test_a_missing_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "MODEL_PATH", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"must be installed with dpopt; got no config.json .*; install dpopt"
    ):
        model_path()
