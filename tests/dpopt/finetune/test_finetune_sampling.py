# SPDX-License-Identifier: Apache-2.0
"""Samplers, relations, secure randomness and resumption of a fine-tuning run."""

import json
from pathlib import Path

import pytest

from accountants import RELATIONS, read
from accountants.registry import ACCOUNTANTS
from dpopt.finetune import InputError, finetune
from dpopt.finetune.run_report import ACCOUNTANTS as TOLD
from dpopt.finetune.run_report import NEIGHBOURS, SAMPLERS
from dpopt.sampling.registry import SAMPLERS as KNOWN


def charges(ledger: Path) -> int:
    return sum(record.kind == "charge" for record in read(ledger).records)


def test_the_report_has_words_for_every_name() -> None:
    assert set(TOLD) == set(ACCOUNTANTS)
    assert set(NEIGHBOURS) == set(RELATIONS)
    assert set(SAMPLERS) == set(KNOWN) - {"users"}


@pytest.mark.parametrize(
    ("sampler", "relation", "paid"),
    [
        ("balls-in-bins", "add-or-remove-one", 2),
        ("shuffled", "replace-one", 2),
        ("truncated-poisson", "add-or-remove-one", 6),
        ("fixed-size", "zero-out-one", 6),
    ],
)
def test_a_run_is_charged_and_reported_by_its_sampler(config, sampler, relation, paid) -> None:
    result = finetune(config(sampler=sampler, relation=relation, steps=6, epsilon=5.0))
    report = json.loads((result.out / "report.json").read_text())
    assert charges(result.out / "privacy.ledger.jsonl") == paid
    assert 4.5 < report["epsilon"] <= 5.0
    assert report["sampler"] == SAMPLERS[sampler]
    assert report["neighbouring_relation"] == NEIGHBOURS[relation]


def test_a_sampler_without_a_price_is_refused(config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="proven price under add-or-remove-one"):
        finetune(config(sampler="shuffled"))
    with pytest.raises(InputError, match="expected a sampler of records"):
        config(sampler="users")
    assert not (tmp_path / "out").exists()


def test_a_secure_run_says_what_it_assumes(config) -> None:
    result = finetune(config(secure=True))
    report = json.loads((result.out / "report.json").read_text())
    assert "AES-256" in report["randomness"]
    assert any("rounding in floating-point sums" in text for text in report["assumptions"])
    assert "rounding in floating-point sums" in (result.out / "report.md").read_text()


def test_resuming_goes_on_with_the_same_noise_and_refuses_a_change(config, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    first = finetune(config(ledger=ledger, noise_multiplier=1.5, out=tmp_path / "a"))
    second = finetune(config(ledger=ledger, resume=True, epsilon=50.0, out=tmp_path / "b"))
    assert second.report.noise_multiplier == first.report.noise_multiplier == 1.5
    assert charges(ledger) == 8 and second.report.epsilon > first.report.epsilon
    written = ledger.read_bytes()
    for changed in ({"clip_norm": 2.0}, {"batch_size": 10}, {"accountant": "pld"}, {"secure": True}):
        with pytest.raises(ValueError, match="expected the configuration of the last run"):
            finetune(
                config(
                    **{"ledger": ledger, "resume": True, "epsilon": 50.0, "out": tmp_path / "c", **changed}
                )
            )
        assert ledger.read_bytes() == written
    with pytest.raises(InputError, match="expected a ledger with the run to resume"):
        finetune(config(resume=True, out=tmp_path / "d"))
    with pytest.raises(InputError, match="leave it out"):
        config(resume=True, noise_multiplier=1.0)
