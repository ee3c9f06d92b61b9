# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: weights go back, what was spent does not, and no file runs code."""

import io
import os
import pathlib
import shutil

import opacus
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import dpopt
from dpopt import PrivacyEngine
from tests.support.dpopt.private_runs import D, examples, familiar, mlp, train

DELTA = 1e-5
pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


def begin(ledger, model=None, num=40, **options):
    engine = PrivacyEngine(accountant="rdp", ledger=ledger)
    model = mlp() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    options = {"noise": 1.0, "batch_size": 10} | options
    return familiar(model, examples(num), engine=engine, optimizer=optimizer, **options)


def save(run, path, **options):
    engine, model, optimizer, _ = run
    engine.save_checkpoint(path=path, module=model, optimizer=optimizer, **options)


def load(run, path, **options):
    engine, model, optimizer, _ = run
    return engine.load_checkpoint(path=path, module=model, optimizer=optimizer, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_guarantee_loading_gives_no_charge_back(tmp_path):
    """Save, train on, go back: the weights are the old ones, the ledger has everything."""
    run = begin(tmp_path / "ledger")
    train(*run[1:])
    save(run, tmp_path / "c1")
    old, spent = weights(run[1]), run[0].get_epsilon(DELTA)
    train(*run[1:])
    more = run[0].get_epsilon(DELTA)
    load(run, tmp_path / "c1")
    assert same(weights(run[1]), old) and run[0].get_epsilon(DELTA) == more > spent
    run[0].detach()
    again = begin(tmp_path / "ledger")
    load(again, tmp_path / "c1")
    assert same(weights(again[1]), old) and again[0].get_epsilon(DELTA) == more
    assert again[0].training.ledger.num_charges == 8
    train(*again[1:])
    assert again[0].training.ledger.num_charges == 12 and again[0].accountant.history == [(1.0, 0.25, 12)]


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    """Without noise, at a rate of one: Adam's moments, the schedule and the weights continue."""

    def whole(stop):
        run = begin(tmp_path / f"ledger-{stop}", noise=0.0, batch_size=40)
        for step in range(6):
            if step == 3 and stop:
                save(run, tmp_path / "c", checkpoint_dict={"step": step, "names": ["a", ("b", 2.5)]})
                run[0].detach()
                torch.manual_seed(5)
                other = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3))
                run = begin(tmp_path / f"ledger-{stop}", other, noise=0.0, batch_size=40)
                found = load(run, tmp_path / "c")
                assert found["step"] == 3 and found["names"] == ["a", ("b", 2.5)]
            train(*run[1:])
        return weights(run[1])

    first, second = whole(False), whole(True)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-7)


def test_another_a_new_and_an_older_ledger_are_refused_before_anything_is_loaded(tmp_path):
    run = begin(tmp_path / "ledger")
    train(*run[1:])
    shutil.copy(tmp_path / "ledger", tmp_path / "old")
    train(*run[1:])
    save(run, tmp_path / "c")
    kept = (tmp_path / "ledger").read_bytes()
    run[0].detach()
    cases = {
        "new": "expected the ledger that paid for this checkpoint, ledger",
        "other": "which knows nothing of them",
        "old": "got an older state or another branch of it",
        "deleted": "restored from a backup if it was deleted",
    }
    shutil.move(tmp_path / "ledger", tmp_path / "away")
    for kind, text in cases.items():
        other = begin(None if kind == "new" else tmp_path / ("ledger" if kind == "deleted" else kind))
        before = weights(other[1])
        with pytest.raises(ValueError, match=text):
            load(other, tmp_path / "c")
        assert same(weights(other[1]), before) and not other[2].state
        other[0].detach()
    # The remedies, tried: the backup in place, and an older checkpoint's ledger that went on is fine.
    (tmp_path / "ledger").write_bytes(kept)
    again = begin(tmp_path / "ledger")
    load(again, tmp_path / "c")
    again[0].detach()
    # And the weights alone.
    model = mlp()
    model.load_state_dict(torch.load(tmp_path / "c")["module_state_dict"])


def test_the_estimators_public_state_goes_along(tmp_path):
    for clipping in ("quantile:rate=0.5", "slack:rate=0.5", "median:rate=0.5", "two_threshold"):
        path = tmp_path / clipping.partition(":")[0]
        run = begin(path, clipping=clipping)
        train(*run[1:])
        save(run, path.with_suffix(".ck"))
        estimator = run[0].training.estimator
        run[0].detach()
        again = begin(path, clipping=clipping)
        load(again, path.with_suffix(".ck"))
        found = again[0].training.estimator
        for name in ("level", "centre", "average"):
            held = getattr(estimator, name, None)
            if isinstance(held, dict):
                assert held and same(held, getattr(found, name))
            elif held is not None:
                assert held == getattr(found, name) and held.clip_norm != 1.0
        train(*again[1:])


def test_another_estimator_than_the_checkpoints_is_refused(tmp_path):
    run = begin(tmp_path / "ledger", clipping="quantile")
    save(run, tmp_path / "c")
    run[0].detach()
    engine = PrivacyEngine(accountant="rdp", ledger=tmp_path / "ledger", new_configuration=True)
    other = familiar(mlp(), examples(40), engine=engine, batch_size=10, noise=1.0)
    with pytest.raises(
        ValueError,
        match="expected the checkpoint of a run with the estimator 'plain'; got one with 'quantile'",
    ):
        load(other, tmp_path / "c")


def test_a_schedule_goes_on_at_its_place(tmp_path):
    name = "schedule:steps=9,noise_end=0.25"
    run = begin(tmp_path / "ledger", clipping=name)
    train(*run[1:])
    save(run, tmp_path / "c")
    noise = run[2].noise_multiplier
    run[0].detach()
    again = begin(tmp_path / "ledger", clipping=name)
    assert again[2].noise_multiplier == 1.0
    load(again, tmp_path / "c")
    assert again[0].training.event.event.noise_multiplier == noise < 0.6
    train(*again[1:])
    with pytest.raises(RuntimeError, match="load a checkpoint before the first step"):
        load(again, tmp_path / "c")
    assert sorted(n for n, *_ in again[0].accountant.history) == pytest.approx(
        [0.25 ** (round(i / 8 * 100) / 100) for i in range(7, -1, -1)]
    )


def test_schedulers_go_along(tmp_path):
    run = begin(tmp_path / "ledger")
    noise, clip = (
        dpopt.ExponentialNoise(run[2], gamma=0.5),
        dpopt.StepGradClip(run[2], step_size=1, gamma=2.0),
    )
    noise.step()
    clip.step()
    save(run, tmp_path / "c", noise_scheduler=noise, grad_clip_scheduler=clip)
    run[0].detach()
    again = begin(tmp_path / "ledger")
    noise, clip = (
        dpopt.ExponentialNoise(again[2], gamma=0.5),
        dpopt.StepGradClip(again[2], step_size=1, gamma=2.0),
    )
    load(again, tmp_path / "c", noise_scheduler=noise, grad_clip_scheduler=clip)
    assert (again[2].noise_multiplier, again[2].max_grad_norm, noise.last_epoch) == (0.5, 2.0, 1)
    train(*again[1:])
    assert again[0].accountant.history == [(0.5, 0.25, 4)]


def test_a_file_like_object_serves_too(tmp_path):
    run = begin(tmp_path / "ledger")
    buffer = io.BytesIO()
    save(run, buffer, checkpoint_dict={"foo": "bar"})
    buffer.seek(0)
    assert load(run, buffer)["foo"] == "bar"


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = begin(tmp_path / "ledger")
    save(run, tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(
        ValueError, match=r"could only be read by running code; leave it out of checkpoint_dict"
    ):
        save(run, tmp_path / "c", checkpoint_dict={"path": pathlib.Path("x")})
    with pytest.raises(ValueError, match="expected checkpoint_dict without the checkpoint's own keys"):
        save(run, tmp_path / "c", checkpoint_dict={"module_state_dict": {}})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(run, tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir() if "partial" in path.name} == set()


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"module_state_dict": {}, "trap": Trap()}, tmp_path / "c")
    run = begin(tmp_path / "ledger")
    with pytest.raises(ValueError, match="which could only be read by running code"):
        load(run, tmp_path / "c")
    assert not (tmp_path / "trapped").exists()
    torch.save(run[1].state_dict(), tmp_path / "plain")
    with pytest.raises(ValueError, match="expected a file that save_checkpoint wrote"):
        load(run, tmp_path / "plain")
    with pytest.raises(FileNotFoundError):
        load(run, tmp_path / "none")
    with pytest.raises(ValueError, match=r"got \['weights_only'\]"):
        load(run, tmp_path / "c", torch_load_kwargs={"weights_only": False})
    with pytest.raises(ValueError, match=r"got \['pickle_protocol'\]"):
        save(run, tmp_path / "c", torch_save_kwargs={"pickle_protocol": 4})
    with pytest.raises(RuntimeError, match="call make_private first"):
        PrivacyEngine().load_checkpoint(path=tmp_path / "plain", module=mlp())


def test_a_missing_optimizer_is_told(tmp_path):
    run = begin(tmp_path / "ledger")
    train(*run[1:])
    run[0].save_checkpoint(path=tmp_path / "c", module=run[1])
    with pytest.warns(UserWarning, match="holds none of the optimizer's state"):
        load(run, tmp_path / "c")
    save(run, tmp_path / "c")
    with pytest.warns(UserWarning, match="was given no optimizer"):
        run[0].load_checkpoint(path=tmp_path / "c", module=run[1])


def test_a_checkpoint_of_opacus_is_taken_and_its_history_charged_once(tmp_path):
    theirs, engine = mlp(), opacus.PrivacyEngine(accountant="rdp")
    made, optimizer, loader = engine.make_private(
        module=theirs, optimizer=torch.optim.Adam(theirs.parameters(), lr=0.05), noise_multiplier=1.25,
        data_loader=DataLoader(examples(40), batch_size=10), max_grad_norm=1.0,
    )  # fmt: skip
    for x, y in loader:
        optimizer.zero_grad()
        if len(x):
            F.cross_entropy(made(x), y).backward()
            optimizer.step()
    engine.save_checkpoint(path=tmp_path / "theirs.pt", module=made, optimizer=optimizer)
    ((noise, rate, steps),) = engine.accountant.history
    run = begin(tmp_path / "ledger")
    load(run, tmp_path / "theirs.pt", torch_load_kwargs={"map_location": "cpu"})
    assert same(weights(run[1]), weights(theirs)) and run[2].state
    assert run[0].accountant.history == [(noise, rate, steps)] and steps >= 3
    load(run, tmp_path / "theirs.pt")
    assert run[0].accountant.history == [(noise, rate, steps)]
    train(*run[1:])
    assert run[0].get_epsilon(DELTA) > engine.get_epsilon(DELTA)
    torch.save({"module_state_dict": theirs.state_dict()}, tmp_path / "weights")
    with pytest.raises(ValueError, match="expected a checkpoint that says what was spent"):
        load(run, tmp_path / "weights")


def test_buffers_of_a_checkpoint_are_public(tmp_path):
    def frozen(mean):
        norm = nn.BatchNorm1d(D).requires_grad_(False).eval()
        norm.running_mean.fill_(mean)
        return nn.Sequential(norm, nn.Linear(D, 3))

    run = begin(tmp_path / "ledger", frozen(1.0))
    save(run, tmp_path / "c")
    run[0].detach()
    again = begin(tmp_path / "ledger", frozen(0.0))
    load(again, tmp_path / "c")
    assert again[1][0].running_mean[0] == 1
    train(*again[1:])
    with torch.no_grad():
        again[1][0].running_mean.add_(1)
    with pytest.raises(RuntimeError, match="expected buffers that do not change in training"):
        train(*again[1:])
