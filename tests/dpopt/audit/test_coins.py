# SPDX-License-Identifier: Apache-2.0
"""Coins are fair, secret while a run is open, on no disk until it has ended, and cannot be changed afterwards."""

import copy
import json
import os
import pickle
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from accountants import read
from dpopt.audit import Canaries, read_evidence
from dpopt.audit.canaries import coins as sealing
from dpopt.randomness import insecure_key, secret_key
from tests.support.dpopt.auditing import audited, canaries, losses, train

LEDGER = Path("audit/privacy.ledger.jsonl")
COINS, SCORES = LEDGER.with_name("audit-coins.json"), LEDGER.with_name("audit-scores.json")


def run_once(steps=2, **options):
    run, model, dataset = audited(ledger=LEDGER, **options)
    train(run, model, dataset, steps=steps)
    return run


def test_guarantee_coins_are_fair_independent_and_secret(capfd):
    rows = np.stack([sealing.tossed(insecure_key(seed), 64).included for seed in range(2000)])
    assert binomtest(int(rows.sum()), rows.size).pvalue > 1e-4
    together = np.corrcoef(rows.T.astype(float))[np.triu_indices(64, 1)]
    assert np.abs(together).max() < 5.5 / np.sqrt(2000)  # of 2,016 pairs
    assert not np.array_equal(
        sealing.tossed(secret_key(), 64).included, sealing.tossed(secret_key(), 64).included
    )
    coins = sealing.tossed(secret_key(), 64)
    assert repr(coins) == "Coins(64 <hidden>)"
    run, model, dataset = audited(ledger=LEDGER, insecure_seed=None)
    with run:
        for batch in run.batches(dataset, steps=1):
            run.accumulate(losses(model, batch.examples)) if batch.examples else None
            run.release()
        # Open: the only trace is a hash, on the ledger and in a file that nobody else reads.
        (entry,) = json.loads(COINS.read_text())["runs"]
        assert set(entry) == {"run", "sealed"} and entry["sealed"] and not SCORES.exists()
        with pytest.raises(ValueError, match="a run that has ended"):
            read_evidence(LEDGER)
        with pytest.raises(RuntimeError, match="whose coins are not opened"):
            run.evidence  # noqa: B018
        for copied in (pickle.dumps, copy.copy):
            with pytest.raises(TypeError, match="expected the coins of a run to stay in it"):
                copied(run._audit)
    told = "".join(capfd.readouterr()) + LEDGER.read_text()
    included = json.loads(COINS.read_text())["runs"][0]["coins"]
    assert json.dumps(included) not in told and '"included"' not in told
    assert stat.S_IMODE(COINS.stat().st_mode) == stat.S_IMODE(SCORES.stat().st_mode) == 0o600


def test_what_is_read_is_what_the_run_had():
    run = run_once()
    for mine, found in zip(run.evidence, read_evidence(LEDGER), strict=True):
        assert mine.to_json() == found.to_json()
    about = sealing.about(LEDGER)
    assert about["steps"] == 2 and 0 < about["moved_each_step"] < 0.5 * np.sqrt(40)


def test_guarantee_a_changed_coin_is_noticed():
    run_once()
    told = json.loads(COINS.read_text())
    told["runs"][0]["coins"][3] ^= 1
    COINS.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="expected the coins whose hash is on the ledger"):
        read_evidence(LEDGER)


def test_evidence_with_other_coins_than_those_tossed_is_noticed():
    run_once()
    told = json.loads(COINS.read_text())
    told["runs"][0]["included"][0][3] ^= 1
    COINS.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="expected the coins whose hash is on the ledger"):
        read_evidence(LEDGER)


def test_files_of_another_ledger_are_noticed():
    run_once()
    other = LEDGER.with_name("other.jsonl")
    run, model, dataset = audited(ledger=other)
    train(run, model, dataset, steps=1)
    other.with_name("other.audit-coins.json").write_bytes(COINS.read_bytes())
    other.with_name("other.audit-scores.json").write_bytes(SCORES.read_bytes())
    (other_attempt,) = [r for r in read(other).records if r.kind == "attempt"]
    assert other_attempt.payload["config"]["audit"]["canaries"] == 40
    # Both are of the same public seed, so the hash alone would fit: a fresh ledger without the run does not.
    third = LEDGER.with_name("third.jsonl")
    run, model, dataset = audited(ledger=third, audit=None)
    train(run, model, dataset, steps=1)
    third.with_name("third.audit-coins.json").write_bytes(COINS.read_bytes())
    third.with_name("third.audit-scores.json").write_bytes(SCORES.read_bytes())
    with pytest.raises(ValueError, match="expected the coins whose hash is on the ledger"):
        read_evidence(third)


def test_a_run_that_is_killed_opens_nothing_and_loses_nothing():
    run_once(insecure_seed=None)
    before = SCORES.read_bytes()
    child = os.fork()
    if not child:
        try:
            run, model, dataset = audited(ledger=LEDGER, insecure_seed=None)
            with run:
                for batch in run.batches(dataset, steps=5):
                    run.accumulate(losses(model, batch.examples)) if batch.examples else None
                    run.release()
                    if run.steps == 3:
                        os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    first, second = json.loads(COINS.read_text())["runs"]
    assert "coins" in first and set(second) == {"run", "sealed"} and SCORES.read_bytes() == before
    with pytest.raises(ValueError, match="was killed, whose coins nobody knows"):
        read_evidence(LEDGER)
    # The run that goes on has coins of its own, and everything charged before counts in its claim.
    run = run_once(insecure_seed=None)
    assert read_evidence(LEDGER)[0].to_json() == run.evidence[0].to_json()
    assert run.ledger.num_charges == 2 + 3 + 2
    assert sealing.about(LEDGER)["charges_before"] == 5


def test_single_steps_may_be_as_many_as_canaries():
    for seed in range(4):  # rate 1 and one step: as many pairs as canaries, where half of them are in
        run, model, dataset = audited(
            8, ledger=LEDGER.with_name(f"{seed}.jsonl"), rate=1.0, insecure_seed=seed
        )
        train(run, model, dataset, steps=1)
        found = read_evidence(LEDGER.with_name(f"{seed}.jsonl"))
        assert [one.num_records for one in found[:1]] == [8]


def test_an_interrupted_run_has_the_evidence_of_its_steps():
    run, model, dataset = audited(ledger=LEDGER)
    with pytest.raises(KeyboardInterrupt), run:
        for batch in run.batches(dataset, steps=5):
            run.accumulate(losses(model, batch.examples)) if batch.examples else None
            run.release()
            if run.steps == 2:
                raise KeyboardInterrupt
    assert read_evidence(LEDGER)[2].num_steps == 2


def test_a_full_disk_leaves_the_files_as_they_were(monkeypatch):
    run, model, dataset = audited(ledger=LEDGER)

    def full(path, write):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), run:
        for batch in run.batches(dataset, steps=1):
            run.accumulate(losses(model, batch.examples)) if batch.examples else None
            run.release()
        monkeypatch.setattr(sealing, "written_file", full)
    assert set(json.loads(COINS.read_text())["runs"][0]) == {"run", "sealed"} and not SCORES.exists()
    assert run.evidence[0].num_records == 40  # still in the process


def test_a_run_that_releases_nothing_tells_nothing():
    run, _, _ = audited(ledger=LEDGER)
    with run:
        pass
    with pytest.raises(ValueError, match="a run that has ended"):
        read_evidence(LEDGER)
    with pytest.raises(FileNotFoundError, match="audit=Canaries"):
        read_evidence(Path("nowhere.jsonl"))


def test_a_run_entered_again_tosses_anew():
    run, model, dataset = audited(ledger=LEDGER, insecure_seed=None)
    train(run, model, dataset, steps=1)
    first = run.evidence[0]
    train(run, model, dataset, steps=1)
    assert not np.array_equal(first.included, run.evidence[0].included)
    assert len(json.loads(COINS.read_text())["runs"]) == 2


@pytest.mark.parametrize("broken", ["", "[]", '{"version": 7, "runs": []}'])
def test_files_that_are_something_else_are_refused_and_kept(broken):
    COINS.parent.mkdir()
    COINS.write_text(broken)
    run, model, dataset = audited(ledger=LEDGER)
    with pytest.raises(ValueError, match="move it away"):
        train(run, model, dataset, steps=1)
    assert COINS.read_text() == broken


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator, remedy", [("clip21", "take another, such as flat"), ("dice", "take flat or two_threshold"),
                                               ("coordinate_median", "take flat or huber")])  # fmt: skip
def test_estimators_under_which_a_canary_is_no_honest_record(estimator, remedy):
    with pytest.raises(ValueError, match=remedy):
        audited(estimator=estimator)


def test_places_that_cannot_be():
    model = audited()[1]
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen or not of the model"):
        audited(model=model)
    with pytest.raises(ValueError, match="take fewer canaries"):
        audited(3, audit=Canaries(5000))
    with pytest.raises(ValueError, match="places from 0 to 42"):
        audited(audit=Canaries(2, where={"weight": [0, 43]}))
    with pytest.raises(ValueError, match="a place for each of 3 canaries"):
        Canaries(3, where={"weight": [1, 1, 2]})


@pytest.mark.parametrize("options", [{"num": 1}, {"num": True}, {"kind": "mislabelled"}, {"records": [1, 2], "num": 2},
                                     {"kind": "x", "num": 2, "records": [1, 2], "losses": print, "untouched": True}])  # fmt: skip
def test_canaries_that_cannot_be(options):
    with pytest.raises(ValueError, match=r"expected .*; got .*; "):
        Canaries(**options)


def test_a_mechanism_that_does_not_tell_its_noise():
    class Own:
        def event(self):
            from accountants import Gaussian

            return Gaussian(1.0)

        def check(self, sensitivities, sizes):
            pass

        def release(self, clipped, noise, divisor=1.0):
            return dict(clipped.total)

    with pytest.raises(ValueError, match="a mechanism that tells its noise"):
        audited(mechanism=Own(), audit=canaries(40))
