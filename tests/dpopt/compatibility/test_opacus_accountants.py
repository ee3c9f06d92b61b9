# SPDX-License-Identifier: Apache-2.0
"""Accountants in Opacus' shape: of a ledger, which only releases feed, and of a history kept by hand."""

import opacus
import pytest
from opacus.accountants import create_accountant as theirs
from opacus.accountants.utils import get_noise_multiplier as their_noise

from dpopt import PrivacyEngine
from dpopt.opacus import (
    GaussianAccountant,
    PRVAccountant,
    RDPAccountant,
    create_accountant,
    get_noise_multiplier,
)
from tests.support.dpopt.private_runs import examples, familiar, train

DELTA = 1e-5


def test_the_accountant_of_an_engine_tells_its_ledger():
    engine = PrivacyEngine(accountant="rdp")
    assert engine.accountant.history == [] and len(engine.accountant) == 0
    assert engine.accountant.mechanism() == "rdp"
    with pytest.raises(RuntimeError, match="call make_private first"):
        engine.accountant.get_epsilon(delta=DELTA)
    engine, model, optimizer, loader = familiar(engine=engine, dataset=examples(40), batch_size=10, noise=1.5)
    assert engine.accountant.get_epsilon(DELTA) == 0
    train(model, optimizer, loader)
    assert engine.accountant.history == [(1.5, 0.25, 4)] and len(engine.accountant) == 1
    expected = engine.get_epsilon(DELTA)
    assert engine.accountant.get_epsilon(delta=DELTA, alphas=[2, 3.5, 64]) == expected > 0
    assert engine.accountant.get_epsilon(DELTA, [2]) == expected
    assert engine.accountant.state_dict() == {"history": [(1.5, 0.25, 4)], "mechanism": "rdp"}
    with pytest.raises(RuntimeError, match=r"charged by optimizer.step\(\) alone"):
        engine.accountant.step(noise_multiplier=1.0, sample_rate=0.1)
    with pytest.raises(RuntimeError, match="which would forget what was spent since"):
        engine.accountant.load_state_dict(engine.accountant.state_dict())
    with pytest.raises(ValueError, match="expected orders alphas > 1; got 1"):
        engine.accountant.get_epsilon(DELTA, alphas=[1])
    with pytest.raises(AttributeError):
        engine.accountant = "rdp"


def test_what_a_history_cannot_hold_is_said():
    engine = PrivacyEngine(accountant="rdp", sampler="balls-in-bins")
    engine, model, optimizer, loader = familiar(engine=engine, dataset=examples(16), noise=1.0)
    train(model, optimizer, loader)
    with pytest.raises(ValueError, match="expected Poisson-sampled Gaussian steps"):
        _ = engine.accountant.history
    assert engine.accountant.state_dict() == {"mechanism": "rdp"}


HISTORY = [(1.1, 0.01, 300), (0.8, 0.02, 50), (1.1, 0.01, 7)]


@pytest.mark.filterwarnings("ignore:Optimal order is the")
@pytest.mark.parametrize(("name", "make"), [("rdp", RDPAccountant), ("prv", PRVAccountant)])
def test_a_history_kept_by_hand_is_priced_as_opacus_prices_it(name, make):
    ours, other = make(), theirs(name)
    for noise, rate, steps in HISTORY:
        for _ in range(steps):
            ours.step(noise_multiplier=noise, sample_rate=rate)
            other.step(noise_multiplier=noise, sample_rate=rate)
    assert ours.history == other.history == HISTORY and len(ours) == len(other) == 3
    expected = other.get_epsilon(delta=DELTA)
    found = ours.get_epsilon(delta=DELTA)
    assert found == pytest.approx(expected, rel=1e-3) if name == "prv" else found <= expected * 1.001
    again = create_accountant(name)
    again.load_state_dict(ours.state_dict())
    assert again.get_epsilon(DELTA) == found and ours.mechanism() == name
    with pytest.raises(ValueError, match="expected the state of an accountant called"):
        create_accountant("zcdp").load_state_dict(ours.state_dict())
    assert make().get_epsilon(DELTA) == 0


def test_the_central_limit_is_no_accountant():
    for make in (GaussianAccountant, lambda: create_accountant("gdp"), lambda: PrivacyEngine(accountant="gdp"),
                 lambda: get_noise_multiplier(target_epsilon=1.0, target_delta=DELTA, sample_rate=0.1, steps=1,
                                              accountant="gdp")):  # fmt: skip
        with pytest.raises(ValueError, match="the central limit of many steps"):
            make()


@pytest.mark.filterwarnings("ignore:Optimal order is the")
@pytest.mark.parametrize("target", [0.5, 3.0])
def test_the_noise_for_a_target_is_that_of_opacus(target):
    options = {"target_epsilon": target, "target_delta": DELTA, "sample_rate": 0.01}
    for count in ({"epochs": 3}, {"steps": 300}):
        expected = their_noise(**options, **count, accountant="rdp", epsilon_tolerance=1e-3)
        found = get_noise_multiplier(**options, **count, epsilon_tolerance=1e-3)
        assert found == pytest.approx(expected, rel=0.02) and found <= expected * 1.003
    with pytest.raises(ValueError, match="expected steps or epochs; got both or neither"):
        get_noise_multiplier(**options, steps=1, epochs=1)


def test_the_hook_of_a_history_counts_the_steps_of_a_private_optimizer():
    counted = RDPAccountant()
    engine, model, optimizer, loader = familiar(dataset=examples(16), noise=1.0)
    optimizer.attach_step_hook(counted.get_optimizer_hook_fn(sample_rate=0.5))
    train(model, optimizer, loader)
    assert counted.history == engine.accountant.history == [(1.0, 0.5, 2)]
    assert counted.get_epsilon(DELTA) == pytest.approx(engine.get_epsilon(DELTA), rel=1e-9)
    assert opacus.__version__.startswith("1.")
