# SPDX-License-Identifier: Apache-2.0
"""The guarantees that the docstring of `PrivateTraining` quotes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from accountants import Gaussian, PoissonSampled, Repeated, accountant, charged, read
from dpopt import Budget, BudgetExhausted, GaussianMechanism, GroupClipper, per_layer
from dpopt.mechanisms.gaussian import add_normal
from dpopt.randomness import insecure_key, normals
from dpopt.release.randomness_tiers import FastTier
from dpopt.release.write_gradients import write_gradients
from tests.support.dpopt.private_runs import (
    NOBODY,
    assert_gradients,
    clipped_mean,
    examples,
    explicit,
    familiar,
    losses_of,
    mlp,
)


def charges(path):
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [line for line in lines if line["kind"] == "charge"]


def noise_of(seed, charge, name, like, std):
    """The noise that a run with this seed gives a parameter, by the source of its tier."""
    noise = torch.zeros_like(like)
    add_normal(noise, std, FastTier(insecure_key(seed)).noise(charge, name, torch.device("cpu")))
    return noise


@pytest.mark.parametrize("source", ["of this machine", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guarantee_release_is_the_charged_mechanism(tmp_path, dtype, source, monkeypatch):
    if source == "torch":
        monkeypatch.setattr(normals, "available", lambda: False)
    model, data = mlp(dtype), examples(8, dtype)
    expected = clipped_mean(model, data, clip=0.5, expected=10.0)
    ledger = tmp_path / "ledger.jsonl"
    training = explicit(model, noise=1.5, clip=0.5, expected=10.0, ledger=ledger, insecure_seed=7)
    with training as private:
        for batch in private.batches(data, steps=1):
            private.accumulate(losses_of(model, batch.examples))
            private.release()
        (charge,) = charges(ledger)
        assert private.ledger.events().events == (Repeated(PoissonSampled(1.0, Gaussian(1.5)), 1),)
    # Exactly the clipped sum plus noise of 1.5 times its sensitivity, over the public constant.
    for name, value in expected.items():
        expected[name] = value + noise_of(7, charge["seq"], name, value, 1.5 * 0.5) / 10.0
    assert_gradients(model, expected, tolerance=1e-6)


def test_guarantee_release_is_the_charged_mechanism_for_group_clippers():
    model = mlp()
    clipper = per_layer(model, 2.0)
    assert isinstance(clipper, GroupClipper) and clipper.sensitivity == pytest.approx(2.0)
    with explicit(model, clipper=clipper, rate=NOBODY, expected=1.0, noise=3.0, insecure_seed=1) as private:
        for _ in private.batches(examples(3), steps=1):
            private.release()
            seq = private.ledger._last.seq
    torch.testing.assert_close(model[0].bias.grad, noise_of(1, seq, "0.bias", model[0].bias.detach(), 6.0))


def test_guarantee_charge_is_durable_before_noise(tmp_path, monkeypatch):
    ledger, seen = tmp_path / "ledger.jsonl", []
    original = GaussianMechanism.release

    def look(self, clipped, noise, divisor):
        seen.append(len(charges(ledger)))
        assert all(p.grad is None for p in model.parameters()) or seen != [1]
        return original(self, clipped, noise, divisor)

    monkeypatch.setattr(GaussianMechanism, "release", look)
    model = mlp()
    with explicit(model, noise=1.0, ledger=ledger) as private:
        for batch in private.batches(examples(8), steps=3):
            private.accumulate(losses_of(model, batch.examples))
            private.release()
    assert seen == [1, 2, 3]


KILLED = """
    import os, signal, sys
    import torch
    from tests.support.dpopt.private_runs import examples, explicit, losses_of, mlp
    from dpopt.mechanisms import gaussian

    def die(*_):
        open("before-noise", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

    model = mlp()
    with explicit(model, noise=1.0, ledger="ledger.jsonl") as private:
        for step, batch in enumerate(private.batches(examples(8), steps=4)):
            if step == 2:
                gaussian.add_normal = die
            private.accumulate(losses_of(model, batch.examples))
            private.release()
"""


def test_guarantee_charge_is_durable_before_noise_under_kill(tmp_path):
    here = str(Path(__file__).parents[3])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED)],
        env={**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (tmp_path / "before-noise").exists()
    ledger = tmp_path / "ledger.jsonl"
    assert len(charges(ledger)) == 3
    # A resumed run begins with what the dead one spent, and has other noise.
    with explicit(mlp(), noise=1.0, ledger=ledger) as private:
        assert private.ledger.num_charges == 3
        spent = accountant("rdp").curve(charged(read(ledger).records)).epsilon(1e-5)
        assert private.epsilon(1e-5) == spent > 0


def refused_release(private, model):
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    num_charges = private.ledger.num_charges
    with pytest.raises(Exception) as error:
        private.release()
    assert private.ledger.num_charges == num_charges
    for p, old in zip(model.parameters(), before, strict=True):
        assert (p.grad is None) == (old is None) and (old is None or torch.equal(p.grad, old))
    return error.value


def test_guarantee_refusal_releases_nothing(tmp_path):
    model = mlp()
    budget = Budget(20.0, 1e-5)
    with explicit(model, noise=1.0, budget=budget, ledger=tmp_path / "l.jsonl") as private:
        most = private.steps_left
        assert most >= 1
        for batch in private.batches(examples(8), steps=most):
            private.accumulate(losses_of(model, batch.examples))
            private.release()
        assert (
            private.epsilon(1e-5)
            <= 20.0
            < accountant("rdp").curve(Repeated(private.event, most + 1)).epsilon(1e-5)
        )
        with pytest.raises(BudgetExhausted, match=r"room for 0 after .*nothing was charged"):
            next(private.batches(examples(8), steps=1))
        private.begin(private.draw(8).number, 8)
        private.accumulate(losses_of(model, examples(8)))
        assert isinstance(refused_release(private, model), BudgetExhausted)
    assert len(charges(tmp_path / "l.jsonl")) == most


def test_guarantee_refusal_releases_nothing_when_the_model_changed():
    model = mlp()
    model[0].register_buffer("statistic", torch.zeros(2))
    with explicit(model, noise=1.0) as private:
        for batch in private.batches(examples(8), steps=1):
            private.accumulate(losses_of(model, batch.examples))
            model[0].statistic.data.add_(1.0)
            assert "without noise" in str(refused_release(private, model))
            model[0].statistic.data.zero_()
            model[2].bias.requires_grad_(False)
            assert "'2.bias'" in str(refused_release(private, model))
            model[2].bias.requires_grad_(True)
            private.mechanism = GaussianMechanism(0.1)
            assert "mechanism and sampling that the run began with" in str(refused_release(private, model))
            private.mechanism = GaussianMechanism(1.0)
            private.release()


def test_guarantee_refusal_releases_nothing_when_the_disk_is_full(monkeypatch):
    from accountants import storage as ledger_module

    def full(*_):
        raise OSError(28, "No space left on device")

    model = mlp()
    with explicit(model, noise=1.0) as private:
        for batch in private.batches(examples(8), steps=1):
            private.accumulate(losses_of(model, batch.examples))
            monkeypatch.setattr(ledger_module, "write_durably", full)
            for _ in range(2):
                with pytest.raises(ledger_module.LedgerNotDurable):
                    private.release()
            assert all(p.grad is None for p in model.parameters())
            break


def test_a_failed_mechanism_is_paid_for_and_its_noise_is_never_used_again(monkeypatch):
    domains = []

    class Failing(GaussianMechanism):
        __slots__ = ()

        def release(self, clipped, noise, divisor):
            noise("0.weight", torch.device("cpu"))
            if len(domains) == 1:
                raise torch.OutOfMemoryError("scratch")
            return GaussianMechanism.release(self, clipped, noise)

    from dpopt.release import randomness_tiers as tiers

    original = tiers.FastTier.noise

    def watched(self, charge, name, device):
        domains.extend([charge] if name == "0.weight" else [])
        return original(self, charge, name, device)

    monkeypatch.setattr(tiers.FastTier, "noise", watched)
    model = mlp()
    with explicit(model, mechanism=Failing(1.0)) as private:
        batches = private.batches(examples(8), steps=2)
        private.accumulate(losses_of(model, next(batches).examples))
        with pytest.raises(torch.OutOfMemoryError):
            private.release()
        assert all(p.grad is None for p in model.parameters())
        assert private.ledger.num_charges == private.steps == 1
        private.accumulate(losses_of(model, next(batches).examples))
        private.release()
        assert private.ledger.num_charges == 2
    assert domains[0] != domains[1]


def test_the_familiar_door_charges_the_loader_that_ran():
    engine, model, optimizer, loader = familiar(dataset=examples(20), batch_size=8, noise=1.0)
    for inputs, labels in loader:
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert engine.training.ledger.events().events == (Repeated(PoissonSampled(1 / 3, Gaussian(1.0)), 3),)
    assert engine.training.sampling.expected_batch_size == 6
    engine.detach()


def test_gradients_are_written_all_or_none():
    parameters = dict(mlp().named_parameters())

    class Interrupted(dict):
        def items(self):
            for number, item in enumerate(super().items()):
                if number == 2:
                    raise KeyboardInterrupt
                yield item

    released = {name: torch.ones_like(p) for name, p in parameters.items()}
    write_gradients(parameters, released)
    with pytest.raises(KeyboardInterrupt):
        write_gradients(Interrupted(parameters), released)
    assert all(p.grad is None for p in parameters.values())
