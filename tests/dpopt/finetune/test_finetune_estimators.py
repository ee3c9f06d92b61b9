# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning with estimators that carry state: a run of two steps, and what its report says."""

import json
import math

import pytest
import torch

from accountants import HiddenFeedback, PoissonSampled, UnpricedEvent, accountant, charged, leaves, read
from dpopt.finetune import InputError, finetune

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # raised by peft

CASES = [
    ("two_threshold:rest=2", 0, "averages of releases are free"),
    ("quantile", 0, "follows the 0.5 quantile by a noisy count"),
    ("diff2", 0, "differences clipped at 1 |x - x'|"),
    ("clip21", 2, "a record's memory is its own"),
    ("dice", 2, "which is not amplified by sampling"),
    ("geometric_median", 2, "its noise shared by 2 rounds"),
]


@pytest.mark.parametrize(("estimator", "rank", "guarantee"), CASES)
def test_a_run_says_which_estimator_made_it_and_what_that_costs(config, estimator, rank, guarantee) -> None:
    made = config(estimator=estimator, lora_rank=rank, steps=2, epsilon=4.0)
    result = finetune(made)
    told = json.loads((result.out / "report.json").read_text())
    assert told["estimator"] == estimator and guarantee in told["guarantee"]
    assert 0 < told["epsilon"] <= 4.0 and told["ledger_charges"] == 2
    events = charged(read(result.out / "privacy.ledger.jsonl").records)
    curve = accountant("rdp").curve(events)
    assert math.isclose(told["epsilon"], curve.epsilon(told["delta"]), rel_tol=1e-2)
    assert told["epsilon"] >= curve.epsilon(told["delta"]) * (1 - 1e-9)
    kinds = {type(leaf) for leaf, _ in leaves(events)}
    assert kinds == {HiddenFeedback if estimator == "dice" else PoissonSampled}
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


@pytest.mark.parametrize(
    ("estimator", "match"),
    [
        ("two_treshold", "expected an estimator out of"),
        ("median:rate=0", "expected 0 < rate <= 1"),
        ("quantile:share=2", "expected 0 < share < 1"),
        ("diff2:restart=0", "restart >= 1"),
    ],
)
def test_what_no_estimator_is_called_is_refused_before_the_run(config, estimator, match) -> None:
    with pytest.raises((InputError, ValueError), match=match):
        finetune(config(estimator=estimator, steps=2))


@pytest.mark.parametrize("estimator", ["median", "quantile", "slack"])
def test_a_record_that_speaks_empty_has_no_price_under_zero_out(config, estimator) -> None:
    with pytest.raises((InputError, UnpricedEvent), match="a record without a gradient adds nothing"):
        finetune(config(estimator=estimator, sampler="fixed-size", relation="zero-out-one", steps=2))


def test_a_record_that_is_silent_when_empty_has_one(config) -> None:
    made = config(estimator="two_threshold", sampler="fixed-size", relation="zero-out-one", steps=2)
    assert json.loads((finetune(made).out / "report.json").read_text())["ledger_charges"] == 2
