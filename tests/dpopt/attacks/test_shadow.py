# SPDX-License-Identifier: Apache-2.0
"""Shadow models: fair and balanced coins, whole models only, and a training that goes on where it was killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dpopt.attacks.language_signals import sequence_losses
from dpopt.attacks.shadow import (
    PLAN,
    ShadowPlan,
    finished,
    model_path,
    places_of,
    read_plan,
    record_digest,
    train_shadows,
)
from dpopt.attacks.shadow_training import Recipe, steps_of, train_language_model
from dpopt.attacks.signals import fingerprint
from dpopt.finetune.record_files import InputError, TextRecord
from tests.support.dpopt.characters import random_records, tiny_language_model

ROOT = Path(__file__).parents[3]
RECORDS = tuple(record_digest(TextRecord("", f"record {i}")) for i in range(20))
SETTINGS = {"steps": 3, "sizes": (1, 2)}


def write_places(places, folder):
    (folder / "trained-on").write_text(" ".join(str(place) for place in places))


def plan(seed=0, records=RECORDS, settings=SETTINGS):
    return ShadowPlan(records, seed, settings)


def test_every_record_is_in_half_of_the_models_by_fair_coins():
    many = ShadowPlan(tuple(str(i) for i in range(4000)), 3, {})
    included = many.included(6)
    np.testing.assert_array_equal(included.sum(0), 3)
    assert abs(included.mean(1) - 0.5).max() < 4 * 0.5 / np.sqrt(4000)
    assert abs(np.corrcoef(included[0], included[2])[0, 1]) < 4 / np.sqrt(4000)
    np.testing.assert_array_equal(many.included(2), included[:2])  # more models later change none


def test_models_are_trained_on_their_halves_and_only_where_missing(tmp_path):
    made: list[int] = []

    def train(places, seed):
        made.append(seed)
        return places

    train_shadows(tmp_path / "shadows", plan(), 2, train, write_places)
    train_shadows(tmp_path / "shadows", plan(), 4, train, write_places)
    assert len(made) == len(set(made)) == 4
    assert [path.name for path in finished(tmp_path / "shadows")] == [f"model-000{i}" for i in range(4)]
    for number, row in enumerate(read_plan(tmp_path / "shadows").included(4)):
        places = (model_path(tmp_path / "shadows", number) / "trained-on").read_text().split()
        assert [int(place) for place in places] == np.flatnonzero(row).tolist()
    assert (tmp_path / "shadows").stat().st_mode & 0o077 == 0
    assert (tmp_path / "shadows" / PLAN).stat().st_mode & 0o077 == 0


def test_another_plan_is_refused_and_changes_nothing(tmp_path):
    train_shadows(tmp_path, plan(), 2, lambda places, seed: places, write_places)
    before = (tmp_path / PLAN).read_bytes()
    for other in (plan(seed=1), plan(records=RECORDS[::-1]), plan(settings={"steps": 4})):
        with pytest.raises(InputError, match="begun with"):
            train_shadows(tmp_path, other, 2, lambda places, seed: pytest.fail("trained"), write_places)
    assert (tmp_path / PLAN).read_bytes() == before


@pytest.mark.parametrize(
    ("given", "number", "told"),
    [
        (plan(), 3, "even number"),
        (plan(), 0, "even number"),
        (plan(records=RECORDS[:2] * 2), 2, "each record once"),
    ],
)
def test_what_makes_no_halves_is_refused(tmp_path, given, number, told):
    with pytest.raises(InputError, match=told):
        train_shadows(tmp_path, given, number, lambda places, seed: places, write_places)


def test_records_outside_the_pool_have_no_coin(tmp_path):
    assert places_of(plan(), [RECORDS[7], RECORDS[0]]).tolist() == [7, 0]
    with pytest.raises(InputError, match="1 of 2 that are not in it"):
        places_of(plan(), [RECORDS[7], "other"])
    with pytest.raises(InputError, match="train shadow models first"):
        read_plan(tmp_path)


def test_a_model_that_could_not_be_written_is_not_there(tmp_path):
    def fails(places, folder):
        write_places(places, folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        train_shadows(tmp_path, plan(), 2, lambda places, seed: places, fails)
    assert finished(tmp_path) == []
    assert not [path for path in tmp_path.iterdir() if "model" in path.name]


KILLED = """
import sys, time
from pathlib import Path
from tests.dpopt.attacks.test_shadow import plan, write_places
from dpopt.attacks.shadow import train_shadows

def train(places, seed):
    print("training", flush=True)
    time.sleep(float(sys.argv[2]))
    return places

def save(places, folder):
    write_places(places, folder)
    print("half written", flush=True)
    time.sleep(float(sys.argv[2]))

train_shadows(Path(sys.argv[1]), plan(), 4, train, save)
"""


def test_killed_and_started_again_it_trains_what_is_missing(tmp_path):
    shadows = tmp_path / "shadows"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(shadows)]
    train_shadows(shadows, plan(), 2, lambda places, seed: places, write_places)
    kept = model_path(shadows, 1).stat().st_mtime_ns
    with subprocess.Popen([*command, "60"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "training\n"
            with pytest.raises(InputError, match="wait for it"):
                train_shadows(shadows, plan(), 2, lambda places, seed: places, write_places)
        finally:
            process.send_signal(signal.SIGKILL)
    # A model that was being written when the process died leaves its remains under another name.
    (shadows / ".model-0002.partial-1").mkdir()
    write_places([1], shadows / ".model-0002.partial-1")
    assert len(finished(shadows)) == 2
    started = time.monotonic()
    train_shadows(shadows, plan(), 4, lambda places, seed: places, write_places)
    assert time.monotonic() - started < 30
    assert model_path(shadows, 1).stat().st_mtime_ns == kept
    assert len(finished(shadows)) == 4
    assert not list(shadows.glob(".model-*"))


def recipe(**changes):
    given = {"base": "", "steps": 4, "batch_size": 8, "learning_rate": 1e-2, "max_tokens": 32} | changes
    return Recipe(**given)


def test_training_repeats_by_its_seed_and_learns():
    records = random_records(16, prompts=False)
    before = sequence_losses(tiny_language_model(dtype=torch.float32), records).mean()
    for changes in (
        {},
        {"clip_norm": 1.0},
        {"clip_norm": 1.0, "noise_multiplier": 0.5},
        {"optimizer": "sgd", "learning_rate": 0.3},
    ):
        first, again, other = (
            train_language_model(
                recipe(**changes), records, seed, model=tiny_language_model(dtype=torch.float32)
            )
            for seed in (1, 1, 2)
        )
        assert fingerprint(first) == fingerprint(again) != fingerprint(other)
        if "noise_multiplier" not in changes:
            assert sequence_losses(first, records).mean() < before
        assert not first.training


def test_recipes_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="clip norm beside noise"):
        recipe(noise_multiplier=1.0)
    with pytest.raises(InputError, match="adamw or sgd"):
        recipe(optimizer="adam")
    assert steps_of(100, 32, 2.0) == 7
