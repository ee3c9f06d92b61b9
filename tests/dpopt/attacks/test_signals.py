# SPDX-License-Identifier: Apache-2.0
"""Signals of language models and of other modules, against a loop over single records, and what they do not depend on."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dpopt.attacks import language_signals as attack_language
from dpopt.attacks.language_signals import batches_by_length, sequence_losses, token_signals
from dpopt.attacks.signals import class_confidences, classifier_logits, example_losses, fingerprint
from dpopt.finetune.language_model import Tokens, encode
from dpopt.finetune.record_files import TextRecord
from tests.support.dpopt.characters import random_records, tiny_language_model, tokenizer_of_characters


@pytest.fixture(scope="module")
def models():
    return [tiny_language_model(seed) for seed in range(3)]


def by_hand(models, record):
    """For each counted token: log p, mean, deviation, log of the mean reference, expected ratio; plain loops."""
    rows = []
    with torch.no_grad():
        p, *references = [torch.softmax(model(record.ids[None]).logits[0], -1) for model in models]
    for place in range(max(record.num_prompt, 1), len(record.ids)):
        now = p[place - 1]
        token = int(record.ids[place])
        mean = sum(float(x) * math.log(x) for x in now)
        std = math.sqrt(sum(float(x) * (math.log(x) - mean) ** 2 for x in now))
        q = sum(reference[place - 1] for reference in references) / len(references)
        ratio = sum(float(b) * math.log(a / b) for a, b in zip(now, q, strict=True))
        rows.append((math.log(now[token]), mean, std, math.log(q[token]), ratio))
    return np.array(rows)


def test_signals_are_those_of_each_record_by_itself(models):
    records = random_records(12)
    found = token_signals(models[0], records, references=models[1:])
    losses = sequence_losses(models[0], records)
    for i, record in enumerate(records):
        place = slice(found.starts[i], found.starts[i + 1])
        got = [
            one[place]
            for one in (found.log_prob, found.mean, found.std, found.reference, found.expected_ratio)
        ]
        expected = by_hand(models, record)
        np.testing.assert_allclose(np.stack(got, 1), expected, rtol=1e-8, atol=1e-10)
        assert losses[i] == pytest.approx(-expected[:, 0].mean(), rel=1e-9)
        assert found.losses[i] == pytest.approx(losses[i])


def test_batches_and_the_order_of_records_change_nothing(models, monkeypatch):
    records = random_records(15)
    expected = token_signals(models[0], records, references=models[1:2])
    order = np.random.default_rng(0).permutation(15)
    for largest in (1, 2_000, 10**9):
        monkeypatch.setattr(attack_language, "LARGEST_BATCH", largest)
        found = token_signals(models[0], [records[i] for i in order], references=models[1:2])
        np.testing.assert_allclose(found.losses, expected.losses[order], rtol=1e-10)
        np.testing.assert_allclose(found.reference_losses, expected.reference_losses[order], rtol=1e-10)
        batches = list(batches_by_length(records, 44))
        assert sorted(i for batch in batches for i in batch) == list(range(15))
        assert len(batches) == {1: 15, 10**9: 1}.get(largest, len(batches))
        assert all(len(one) == 1 or 44 * len(one) * len(records[one[-1]].ids) <= largest for one in batches)


def test_the_padding_side_of_the_tokenizer_changes_nothing(models):
    found = []
    for side in ("left", "right"):
        tokenizer = tokenizer_of_characters()
        tokenizer.padding_side = side
        records = encode(
            [TextRecord("", text) for text in ("one", "a longer one", "42")], tokenizer, max_tokens=20
        )
        found.append(sequence_losses(models[0], records))
    np.testing.assert_array_equal(*found)


def test_the_model_comes_out_as_it_went_in(models):
    model = tiny_language_model(5)
    model.train()
    model.model.layers[0].eval()
    modes, before = [one.training for one in model.modules()], fingerprint(model)
    done: list[int] = []
    token_signals(model, random_records(5), seen=done.append)
    assert [one.training for one in model.modules()] == modes
    assert fingerprint(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sum(done) == 5


def test_a_cache_answers_for_the_same_models_and_records_only(models, tmp_path, monkeypatch):
    records = random_records(5)
    first = token_signals(models[0], records, references=models[1:2], cache=tmp_path / "kept")
    losses = sequence_losses(models[0], records, cache=tmp_path / "kept")
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
    monkeypatch.setattr(attack_language, "logits", lambda *_: pytest.fail("computed again"))
    again = token_signals(models[0], records, references=models[1:2], cache=tmp_path / "kept")
    np.testing.assert_array_equal(first.reference, again.reference)
    np.testing.assert_array_equal(losses, sequence_losses(models[0], records, cache=tmp_path / "kept"))
    changed = [*records[:-1], Tokens(records[-1].ids, records[-1].num_prompt + 1)]
    for other in ((models[1], records), (models[0], records[::-1]), (models[0], changed)):
        with pytest.raises(pytest.fail.Exception):
            token_signals(*other, references=models[1:2], cache=tmp_path / "kept")


def test_records_without_a_scored_token_and_other_vocabularies_are_refused(models):
    with pytest.raises(ValueError, match="got 1 without"):
        token_signals(models[0], [*random_records(2), Tokens(torch.tensor([4]), 0)])
    other = nn.Module.__new__(nn.Module)
    nn.Module.__init__(other)
    other.weight = nn.Parameter(torch.zeros(1))
    other.forward = lambda input_ids, attention_mask, use_cache: type(
        "Output", (), {"logits": torch.zeros(*input_ids.shape, 7)}
    )
    with pytest.raises(ValueError, match="share a tokenizer"):
        token_signals(models[0], random_records(3), references=[other])


def test_a_token_that_cannot_come_makes_no_nan(models):
    model = tiny_language_model(0)
    plain = model.forward

    def never(**given):
        output = plain(**given)
        output.logits[..., 7] = -torch.inf
        return output

    model.forward = never
    records = [one for one in random_records(8) if 7 not in one.ids]
    found = token_signals(model, records, references=[models[1]])
    assert all(np.isfinite(one).all() for one in (found.mean, found.std, found.expected_ratio))


def test_losses_of_any_module_are_one_for_each_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    points = [(torch.randn(3), i % 2) for i in range(7)]

    def losses(model, batch):
        logits = model(torch.stack([x for x, _ in batch]))
        return nn.functional.cross_entropy(logits, torch.tensor([y for _, y in batch]), reduction="none")

    found = example_losses(model, points, losses, batch_size=3)
    model.eval()
    np.testing.assert_allclose(found, [losses(model, [one]).item() for one in points], rtol=1e-5)
    with pytest.raises(ValueError, match="one loss for each"):
        example_losses(model, points, lambda model, batch: losses(model, batch).mean())


def test_the_confidence_of_a_class_is_the_logit_of_its_probability():
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    p = torch.softmax(logits, -1)[torch.arange(6), labels]
    np.testing.assert_allclose(class_confidences(logits, labels), (p / (1 - p)).log())
    sure = class_confidences(
        torch.tensor([[900.0, 0.0]]), torch.tensor([0])
    )  # a probability that rounds to 1
    assert sure[0] == 900


def test_classifiers_of_hugging_face_and_of_torch_give_logits():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes))
    inputs = {"input_ids": torch.randint(0, 20, (5, 6)), "attention_mask": torch.ones(5, 6, dtype=torch.long)}
    found = classifier_logits(bert, inputs, batch_size=2)
    with torch.no_grad():
        np.testing.assert_allclose(found, bert.eval()(**inputs).logits.double(), atol=1e-6)
    plain = nn.Linear(4, 3)
    assert classifier_logits(plain, torch.randn(5, 4), batch_size=2).shape == (5, 3)
