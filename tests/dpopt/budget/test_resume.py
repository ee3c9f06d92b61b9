# SPDX-License-Identifier: Apache-2.0
"""A run on a ledger that other runs have used: the same configuration or a declared new one, never the same noise."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from accountants import REPLACE, Gaussian, PoissonSampled, Repeated, read
from dpopt import AutomaticClipper, GroupGaussianMechanism, PrivacyEngine, per_layer
from dpopt.budget.declaration import accountant_of
from tests.support.dpopt.private_runs import examples, explicit, losses_of, mlp


def step(private, model, data):
    for batch in private.batches(data, steps=1):
        private.accumulate(losses_of(model, batch.examples))
        private.release()


CHANGES = {
    "noise": ({"noise": 2.0}, "'noise_multiplier': 1.0"),
    "rate": ({"rate": 0.5}, "'sampling_rate': 1.0"),
    "divisor": ({"expected": 9.0}, "'expected_batch_size': 8.0"),
    "clip norm": ({"clip": 2.0}, "'sensitivity': 1.0"),
    "rule": ({"clipper": AutomaticClipper(1.0)}, "'rules': ['FlatClipper']"),
    "groups": ({"clipper": per_layer(mlp(), 1.0)}, "'groups': 1"),
    "mechanism": (
        {"clipper": per_layer(mlp(), 1.0), "mechanism": GroupGaussianMechanism(1.0)},
        "'allocation': None",
    ),
    "accountant": ({"accountant_name": "pld"}, "'accountant': 'rdp'"),
    "randomness": ({"randomness": "secure"}, "'randomness': 'fast'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_configuration_is_refused_unless_declared(name, tmp_path):
    changed, before = CHANGES[name]
    path, data = tmp_path / "ledger.jsonl", examples(8)
    model = mlp()
    with explicit(model, noise=1.0, ledger=path) as private:
        step(private, model, data)
    written = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"expected the configuration of the last run on .*new_configuration=True"
    ) as e:
        explicit(mlp(), **{"noise": 1.0, "ledger": path, **changed}).__enter__()
    assert before in str(e.value)
    assert path.read_bytes() == written
    model = mlp()
    with explicit(model, new_configuration=True, **{"noise": 1.0, "ledger": path, **changed}) as private:
        step(private, model, data)
        assert private.ledger.num_charges == 2
        assert private.epsilon(1e-5) > 0
    with explicit(mlp(), **{"noise": 1.0, "ledger": path, **changed}):
        pass  # now it is the last one


@pytest.mark.parametrize("declared", ["prv", "rdp", None])
def test_a_run_that_names_no_accountant_keeps_the_one_declared(declared, tmp_path):
    path, data = tmp_path / "ledger.jsonl", examples(8)
    model = mlp()
    with explicit(model, noise=1.0, ledger=path, accountant_name=declared) as private:
        step(private, model, data)
        assert private.accountant.name == (declared or "pld")
    again = mlp()
    with explicit(again, noise=1.0, ledger=path, accountant_name=None) as private:
        step(private, again, data)
        assert private.accountant.name == (declared or "pld")
        assert private.epsilon(1e-5) == private.accountant.curve(private.ledger.events()).epsilon(1e-5)
    assert PrivacyEngine(ledger=path)._accountant == (declared or "pld")
    assert PrivacyEngine()._accountant == accountant_of(tmp_path / "none") == "pld"
    with path.open("ab") as file:
        file.write(b'{"kind":"attempt","payload":[not json\n')
    assert accountant_of(path) == (declared or "pld")  # opening it refuses the file


@pytest.mark.parametrize("changed", [{"unit": "one person"}, {"relation": REPLACE}])
def test_unit_and_relation_belong_to_the_ledger(changed, tmp_path):
    path = tmp_path / "ledger.jsonl"
    with explicit(mlp(), noise=1.0, ledger=path):
        pass
    with pytest.raises(ValueError, match=f"{next(iter(changed))} of .* must be"):
        explicit(mlp(), noise=1.0, ledger=path, new_configuration=True, **changed).__enter__()


def test_an_unchanged_configuration_continues_and_both_are_charged(tmp_path):
    path, data = tmp_path / "ledger.jsonl", examples(8)
    for number in (1, 2):
        model = mlp()
        with explicit(model, noise=1.0, ledger=path) as private:
            step(private, model, data)
            assert private.ledger.events().events == (Repeated(PoissonSampled(1.0, Gaussian(1.0)), number),)


CRASHING = """
    import os, signal, sys
    import torch
    from tests.support.dpopt.private_runs import examples, explicit, mlp
    model = mlp()
    private = explicit(model, noise=1.0, rate=0.5, ledger="ledger.jsonl", randomness=sys.argv[1])
    with private:
        for number, batch in enumerate(private.batches(examples(200), steps=3)):
            print([int(x.sum() * 1e6) for x, _ in batch.examples], flush=True)
            private.release()
            print([p.grad.flatten()[0].item() for p in model.parameters()], flush=True)
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("randomness", ["fast", "secure"])
def test_a_resumed_run_repeats_neither_batch_nor_noise(tmp_path, randomness):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CRASHING), randomness],
            env=environment, cwd=tmp_path, capture_output=True, check=False, text=True,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        told += done.stdout.splitlines()
    assert len(told) == len(set(told)) == 8
    found = [record for record in read(tmp_path / "ledger.jsonl").records if record.kind == "charge"]
    assert len(found) == len({record.seq for record in found}) == 4


def test_assumptions_of_every_run_on_the_ledger_are_told(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with explicit(mlp(), noise=1.0, ledger=path) as private:
        (fast,) = private._tier.assumptions
    with explicit(mlp(), noise=1.0, ledger=path, randomness="secure", new_configuration=True) as private:
        said = private.bound(1e-5).assumptions
        assert fast in said and any("AES-256 in counter mode, keyed" in text for text in said)
        assert any("batches of at most 45 examples" in text for text in said)  # 8 + 6 sqrt(8) + 20
    assert torch.is_grad_enabled()
