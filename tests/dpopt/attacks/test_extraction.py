# SPDX-License-Identifier: Apache-2.0
"""Exposure against enumeration word by word, completion against greedy decoding, and a model that knows it all."""

import itertools
import math

import numpy as np
import pytest
import torch

from dpopt.attacks.canaries import (
    SecretCanary,
    SecretFormat,
    draw_secrets,
    read_secrets,
    secret_ids,
    symbol_tokens,
    write_records,
    write_secrets,
)
from dpopt.attacks.extraction import complete, exposures, log_probs_of, log_probs_of_all, rate
from dpopt.finetune.language_model import Tokens
from dpopt.finetune.record_files import InputError
from tests.support.dpopt.characters import random_records, tiny_language_model, tokenizer_of_characters

FORM = SecretFormat("code:", 3, tuple("0123"), "")


@pytest.fixture(scope="module")
def model():
    return tiny_language_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of_characters()


@pytest.mark.parametrize("separator", ["", " ", ", "])
def test_all_secrets_are_priced_as_one_by_one(model, tokenizer, separator):
    form = SecretFormat("code:", 3, tuple("0123"), separator)
    prefix, places = symbol_tokens(form, tokenizer)
    assert [len(place.before) for place in places] == [len(separator)] * 3
    found = log_probs_of_all(model, prefix, places)
    secrets = [
        secret_ids(SecretCanary(form, secret, 0), places)
        for secret in itertools.product(*[form.alphabet] * 3)
    ]
    np.testing.assert_allclose(found, log_probs_of(model, prefix, secrets), rtol=1e-9)
    for secret, log_p in list(zip(secrets, found, strict=True))[::7]:
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([[*prefix, *secret]])).logits[0], -1)
        assert log_p == pytest.approx(sum(float(rows[len(prefix) - 1 + i, s]) for i, s in enumerate(secret)))


def test_exposure_is_the_rank_among_all_secrets(model, tokenizer):
    canaries = [SecretCanary(FORM, secret, 0) for secret in itertools.product(*[FORM.alphabet] * 3)]
    found = exposures(model, tokenizer, canaries)
    by_size = sorted(-one.log_prob for one in found)
    for one in found:
        assert one.rank == 1 + by_size.index(-one.log_prob)
        assert one.exposure == pytest.approx(math.log2(64 / one.rank))
    assert sorted(one.rank for one in found) == list(range(1, 65))
    # -log2 of a uniform rank: about 1 / ln 2 bits on average for secrets that were never seen.
    assert np.mean([one.exposure for one in found]) == pytest.approx(1 / math.log(2), abs=0.15)


def test_the_estimate_of_a_large_space_is_near_the_exact_exposure(tokenizer):
    model = tiny_language_model(2)
    form = SecretFormat("code:", 5, tuple("01234"), "")
    canaries = draw_secrets([form], [0] * 12, seed=3)
    exact = exposures(model, tokenizer, canaries)
    found = exposures(model, tokenizer, canaries, exact_up_to=10, num_samples=1000)
    for one, true in zip(found, exact, strict=True):
        assert one.rank is None
        assert abs(one.exposure - true.exposure) < 1.0
        assert abs(one.sampled - true.exposure) < 1.0 or true.exposure > 7
        assert one.exposure <= math.log2(form.size)


def memorising(text, tokenizer):
    """A model that gives every token of one text, in its place, nearly all of the probability."""
    ids = tokenizer(text)["input_ids"]
    model = tiny_language_model()
    plain = model.forward

    def knows(**given):
        output = plain(**given)
        for row, sequence in enumerate(given["input_ids"].tolist()):
            for place in range(len(sequence)):
                if sequence[: place + 1] == ids[: place + 1] and place + 1 < len(ids):
                    output.logits[row, place, ids[place + 1]] += 60.0
        return output

    model.forward = knows
    return model


def test_a_memorised_secret_has_the_full_exposure_of_its_space(tokenizer):
    form = SecretFormat("code:", 4, tuple("0123456789"), "")
    known, other = SecretCanary(form, tuple("4821"), 10), SecretCanary(form, tuple("4822"), 0)
    model = memorising(known.text, tokenizer)
    full, less = exposures(model, tokenizer, [known, other])
    assert (full.rank, full.exposure) == (1, pytest.approx(math.log2(10_000)))
    assert less.exposure < 14
    estimated = exposures(model, tokenizer, [known], exact_up_to=10, num_samples=500)[0]
    assert estimated.exposure == pytest.approx(math.log2(10_000), abs=1.5)
    assert estimated.sampled <= math.log2(501)


def greedily(model, record, prefix):
    ids = record.ids[:prefix].tolist()
    while len(ids) < len(record.ids):
        with torch.no_grad():
            output = model(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), use_cache=False
            )
        ids.append(int(output.logits[0, -1].argmax()))
    return ids == record.ids.tolist()


def test_completion_is_greedy_decoding(tokenizer):
    model = memorising("the code is 42.", tokenizer)
    records = [*random_records(10), Tokens(torch.tensor(tokenizer("the code is 42.")["input_ids"]), 0)]
    found = complete(model, records)
    for prefix in (1, 3, 8):
        expected = [len(one.ids) > prefix and greedily(model, one, prefix) for one in records]
        assert found.extracted(prefix).tolist() == expected
    assert found.extracted(3)[-1]
    assert found.expected_tries(3)[-1] == pytest.approx(1, abs=1e-6)
    share = rate(found.extracted(3))
    assert share.low < share.value == 1 / 11 < share.high


def test_secrets_are_uniform_distinct_and_survive_their_file(tmp_path):
    drawn = draw_secrets([FORM, SecretFormat("key:", 3)], [0, 1, 5], seed=1)
    assert len({(one.format, one.secret) for one in drawn}) == 6
    write_secrets(tmp_path / "secrets.jsonl", drawn)
    assert read_secrets(tmp_path / "secrets.jsonl") == drawn
    assert (tmp_path / "secrets.jsonl").stat().st_mode & 0o077 == 0
    assert write_records(tmp_path / "records.jsonl", drawn) == 12
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 12
    counts = np.bincount(
        [int(one.secret[0]) for seed in range(400) for one in draw_secrets([FORM], [1], seed=seed)]
    )
    assert counts.min() > 70
    with pytest.raises(InputError, match="longer secrets"):
        draw_secrets([SecretFormat("x", 1, ("0", "1"))], [0, 0, 0])
    with pytest.raises(InputError, match="write them again"):
        read_secrets(tmp_path / "records.jsonl")


def test_a_tokenizer_that_joins_symbols_is_refused(tokenizer):
    prefix, places = symbol_tokens(FORM, tokenizer)
    canary = SecretCanary(FORM, tuple("312"), 0)
    assert [*prefix, *secret_ids(canary, places)] == tokenizer(canary.text)["input_ids"]

    class Joining:
        eos_token_id = 2

        def __call__(self, text, verbose=False):
            return {"input_ids": tokenizer(text.replace("12", "x"))["input_ids"]}

    with pytest.raises(InputError, match="joins or splits"):
        symbol_tokens(FORM, Joining())
