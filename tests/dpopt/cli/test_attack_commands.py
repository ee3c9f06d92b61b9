# SPDX-License-Identifier: Apache-2.0
"""`dpopt audit attack`, `shadow`, `secrets` and `extract`, from files to reports."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dpopt.attacks.canaries import (
    SecretCanary,
    SecretFormat,
    read_secrets,
    write_records,
    write_secrets,
)  # fmt: skip
from dpopt.attacks.files import load_attacked
from dpopt.attacks.language_signals import sequence_losses
from dpopt.attacks.shadow_training import Recipe, train_language_model
from dpopt.cli.commands import app
from dpopt.finetune.language_model import encode, load, save, with_adapter
from dpopt.finetune.record_files import TextRecord
from tests.support.dpopt.characters import tiny_language_model, tokenizer_of_characters


def texts(start, number):
    random = torch.Generator().manual_seed(start)
    draws = torch.randint(0, 10, (number, 8), generator=random).tolist()
    return [f"n {start + i}: " + "".join(str(x) for x in row) for i, row in enumerate(draws)]


def write(path, lines):
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, one that has memorised its members, and the files of members and non-members."""
    folder = tmp_path_factory.mktemp("attacked")
    tokenizer = tokenizer_of_characters()
    save(tiny_language_model(dtype=torch.float32, hidden=32), tokenizer, folder / "base")
    members, others = texts(0, 24), texts(50, 24)
    write(folder / "members.jsonl", members)
    write(folder / "others.jsonl", others)
    records = encode([TextRecord("", text) for text in members], tokenizer, max_tokens=40)
    knows = train_language_model(Recipe(str(folder / "base"), 220, 24, 2e-2), records, 0)
    (folder / "run").mkdir()
    save(knows, tokenizer, folder / "run" / "model")
    return folder


def run(*words):
    return CliRunner().invoke(app, ["audit", *[str(word) for word in words]])


def attack(place, out, *more):
    members, others = place / "members.jsonl", place / "others.jsonl"
    return run(
        "attack",
        place / "run",
        "--members",
        members,
        "--non-members",
        others,
        "--max-tokens",
        40,
        "--out",
        out,
        *more,
    )


def test_a_memorising_model_is_told_in_every_way_that_the_inputs_allow(place, tmp_path):
    shadows = tmp_path / "shadows"
    command = [
        "shadow", "--model", place / "base", "--pool", place / "members.jsonl", "--pool", place / "others.jsonl",
        "--out", shadows, "--num-models", 4, "--epochs", 2, "--batch-size", 12, "--max-tokens", 40,
    ]  # fmt: skip
    for _ in range(2):  # the second time nothing is left to train
        done = run(*command)
        assert done.exit_code == 0, done.output
    before = {path: path.stat().st_mtime_ns for path in shadows.rglob("*.safetensors")}
    assert len(before) == 4
    done = attack(place, tmp_path / "out", "--reference", place / "base", "--shadows", shadows, "--gaussian")
    assert done.exit_code == 0, done.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = json.loads((tmp_path / "out" / "attacks.json").read_text())
    areas = {one["name"]: one["auc"]["value"] for one in found["attacks"]}
    assert len(areas) == 11
    assert min(areas["loss"], areas["calibrated loss"]) > 0.98
    assert areas["LiRA, offline"] > 0.9
    assert found["attacks"][0]["tpr_at_fpr"]["0.01"]["value"] > 0.9
    page = (tmp_path / "out" / "attacks.html").read_text()
    assert "InfoRMIA of tokens" in page
    assert "no guarantee" in page
    assert texts(0, 1)[0] not in page + (tmp_path / "out" / "attacks.json").read_text()
    assert (tmp_path / "out" / "roc.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_alone_is_enough_for_two_attacks_and_a_cache_keeps_them(place, tmp_path):
    first = attack(place, tmp_path / "out", "--cache", tmp_path / "kept")
    again = attack(place, tmp_path / "again", "--cache", tmp_path / "kept")
    assert first.exit_code == again.exit_code == 0
    found = [json.loads((tmp_path / name / "attacks.json").read_text()) for name in ("out", "again")]
    assert [one["name"] for one in found[0]["attacks"]] == ["loss", "Min-K%++"]
    assert found[0]["attacks"] == found[1]["attacks"]
    assert "non-members cannot tell" in first.output


def test_sets_that_differ_by_themselves_are_named(place, tmp_path):
    write(tmp_path / "short.jsonl", [text[:6] for text in texts(50, 24)])
    done = run(
        "attack",
        place / "run",
        "--members",
        place / "members.jsonl",
        "--non-members",
        tmp_path / "short.jsonl",
    )
    assert done.exit_code == 0
    assert "differ by themselves: length" in done.output


def test_what_cannot_be_attacked_is_refused_before_anything_is_written(place, tmp_path):
    members = place / "members.jsonl"
    done = run(
        "attack", place / "run", "--members", members, "--non-members", members, "--out", tmp_path / "out"
    )
    assert done.exit_code == 2
    assert "24 records that are in both" in done.output
    assert attack(place, tmp_path / "out", "--shadows", tmp_path).exit_code == 2
    assert attack(place, tmp_path / "out", "--max-tokens", 1000).exit_code == 2
    assert (
        run(
            "attack", tmp_path / "none", "--members", members, "--non-members", place / "others.jsonl"
        ).exit_code
        == 2
    )
    assert not (tmp_path / "out").exists()


def test_secrets_are_drawn_into_two_files(tmp_path):
    files = ["--out", tmp_path / "secrets.jsonl", "--records", tmp_path / "more.jsonl"]
    done = run("secrets", "--prefix", "ann has", "--prefix", "bob has", *files, "--times", 0, "--times", 3)
    assert done.exit_code == 0, done.output
    assert sorted(one.times for one in read_secrets(tmp_path / "secrets.jsonl")) == [0, 0, 3, 3]
    assert len((tmp_path / "more.jsonl").read_text().splitlines()) == 6


def test_an_inserted_secret_is_exposed_and_its_records_are_completed(place, tmp_path):
    form = SecretFormat("ann has", 3)
    drawn = [SecretCanary(form, tuple("905"), 0), SecretCanary(form, tuple("472"), 12)]
    write_secrets(tmp_path / "secrets.jsonl", drawn)
    write_records(tmp_path / "more.jsonl", drawn)
    _, tokenizer = load(str(place / "base"))
    texts = [json.loads(line)["text"] for line in (tmp_path / "more.jsonl").read_text().splitlines()]
    assert len(texts) == 12
    records = encode([TextRecord("", text) for text in texts], tokenizer, max_tokens=40)
    knows = train_language_model(Recipe(str(place / "base"), 150, 12, 2e-2), records, 0)
    save(knows, tokenizer, tmp_path / "model")
    done = run(
        "extract", tmp_path / "model", "--secrets", tmp_path / "secrets.jsonl", "--records", tmp_path / "more.jsonl",
        "--out", tmp_path / "out", "--prefix-tokens", 8, "--prefix-tokens", 500,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "extraction.json").read_text())
    never, often = found["exposures"]
    assert (often["inserted"], often["rank"], often["exposure"]) == (12, 1, pytest.approx(math.log2(1000)))
    assert never["exposure"] < often["exposure"]
    assert list(found["completed_by_prefix"]) == ["8"]  # no record has 500 tokens
    assert found["completed_by_prefix"]["8"]["value"] == 1
    secret = json.loads((tmp_path / "secrets.jsonl").read_text().splitlines()[1])["secret"]
    assert " ".join(secret) not in done.output + (tmp_path / "out" / "extraction.json").read_text()


def test_nothing_to_look_for_is_refused(place):
    done = run("extract", place / "run")
    assert done.exit_code == 2
    assert "--secrets or --records" in done.output


def test_an_adapter_is_attacked_with_the_model_it_belongs_to(place, tmp_path):
    base, tokenizer = load(str(place / "base"))
    base.config._name_or_path = str(place / "base")
    adapted = with_adapter(base, 2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    save(adapted, tokenizer, tmp_path / "adapter")
    files = [
        "--members",
        place / "members.jsonl",
        "--non-members",
        place / "others.jsonl",
        "--max-tokens",
        40,
    ]
    done = run(
        "attack", tmp_path / "adapter", *files, "--reference", place / "base", "--out", tmp_path / "out"
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "attacks.json").read_text())
    assert {one["name"] for one in found["attacks"]} > {"RMIA", "InfoRMIA of tokens"}
    texts = [json.loads(line)["text"] for line in (place / "members.jsonl").read_text().splitlines()]
    records = encode([TextRecord("", text) for text in texts], tokenizer, max_tokens=40)
    loaded = load_attacked(str(tmp_path / "adapter"))[0]
    np.testing.assert_allclose(sequence_losses(loaded, records), sequence_losses(adapted, records), rtol=1e-5)
