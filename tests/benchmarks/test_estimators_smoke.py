# SPDX-License-Identifier: Apache-2.0
"""The estimator benchmark: its data, its file of runs, its choice, and a whole small report."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from benchmarks.estimators.__main__ import main
from benchmarks.estimators.images import FLIPPED, drawn
from benchmarks.estimators.regression import stable
from benchmarks.estimators.report import at_edge, beside, shown
from benchmarks.estimators.runs import Finished, job_of, made, noise_for, read, run_all
from benchmarks.estimators.tasks import PLANS, Places
from benchmarks.estimators.tuning import chosen

PLAN = replace(PLANS["heavy_tails"], num_records=100, batch_size=20, steps=2)


def finished(pair: tuple[float, float], value: float) -> Finished:
    job = job_of("heavy_tails", PLAN, "flat", 2.0, 1.0, pair, 1000)
    return Finished(job, {"distance to the truth": value}, 0.1)


def test_stable_numbers_have_the_characteristic_function_and_heavy_tails():
    x = stable(200_000, 1.5, torch.Generator().manual_seed(0))
    for t in (0.3, 1.0, 2.0):
        assert torch.cos(t * x).mean().item() == pytest.approx(math.exp(-(t**1.5)), abs=0.01)
    assert x.abs().max() > 100


def test_a_fifth_of_the_training_labels_is_flipped_and_no_row_is_on_both_sides(tmp_path):
    (tmp_path / "digits").mkdir()
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 5_000).astype(np.uint8)
    np.savez(tmp_path / "digits" / "digits.npz", x=rng.integers(0, 256, (5_000, 4), dtype=np.uint8), y=labels)
    problem = drawn(str(tmp_path), "digits", 4_000, 0)
    model = problem.model
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([0.0] + [-1e4] * 9))
    zero = (problem.losses(range(4_000)) < 1).double().mean().item()
    clean = (labels == 0).mean()
    assert zero == pytest.approx(clean * (1 - FLIPPED) + (1 - clean) * FLIPPED / 9, abs=0.02)
    assert problem.scores()["test accuracy, %"] == pytest.approx(100 * clean, abs=2.5)


def test_the_best_pair_is_chosen_and_what_diverged_is_not():
    runs = [finished((1.0, 0.1), math.nan), finished((1.0, 1.0), 2.0), finished((10.0, 0.1), 1.0)]
    assert chosen(runs, PLAN) == {("flat", 2.0): (10.0, 0.1)}
    assert chosen(runs, replace(PLAN, lower=False)) == {("flat", 2.0): (1.0, 1.0)}


def test_the_edge_of_the_grid_is_told():
    assert not at_edge(PLAN, (10.0, 0.1))
    assert at_edge(PLAN, (10.0, 1.0)) and at_edge(PLAN, (1.0, 0.3))


def test_cells_show_spread_and_divergence():
    assert shown([1.0, 1.2]) == "1.100 ± 0.14"
    assert shown([1.0, math.nan]) == "diverges"


def test_differences_are_taken_seed_by_seed():
    assert beside([1.0, 12.0], [0.0, 10.0]) == "+1.5 ± 0.5"
    assert beside([1.0, math.nan], [0.0, 10.0]) == "-"


def test_feedback_is_charged_more_than_plain_clipping():
    plan = PLANS["heavy_tails"]
    assert noise_for("dice:feedback=0.1", plan, 2.0) > 1.5 * noise_for("flat", plan, 2.0)


def test_a_run_repeats_and_an_interrupted_file_goes_on(tmp_path):
    job = job_of("heavy_tails", PLAN, "median", 2.0, 1.0, (1.0, 0.1), 0)
    found = made(job, Places(), PLAN)
    assert found.failure == "" and made(job, Places(), PLAN).scores == found.scores
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(asdict(found)) + "\n" + '{"job": {"task": "hea')
    assert read(path) == {job: found}
    other = replace(job, seed=1)
    assert set(run_all([job, other], path, Places(), PLAN, 1, lambda done, total: None)) == {job, other}
    assert set(read(path)) == {job, other}
    assert run_all([job], path, Places(), PLAN, 1, lambda done, total: None) == {job: found}


def test_a_run_that_fails_says_why():
    job = job_of("heavy_tails", PLAN, "median", 2.0, -1.0, (1.0, 0.1), 0)
    assert "noise" in made(job, Places(), PLAN).failure


def test_a_report_names_every_estimator_and_is_not_made_twice(tmp_path):
    path = tmp_path / "estimators.md"
    words = [
        "--task",
        "heavy_tails",
        "--steps",
        "1",
        "--num-records",
        "1000",
        "--seeds",
        "0",
        "--epsilons",
        "8",
    ]
    words += ["--estimators", "flat", "diff2", "--jobs", "1", "--rounds", "1", "--out", str(path)]
    main(words)
    text, lines = path.read_text(), path.with_suffix(".jsonl").read_text()
    assert "| `flat` |" in text and "| `diff2` |" in text and str(tmp_path) not in text
    assert path.with_suffix(".png").stat().st_size > 10_000
    main(words)
    assert path.with_suffix(".jsonl").read_text() == lines
