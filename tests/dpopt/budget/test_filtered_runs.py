# SPDX-License-Identifier: Apache-2.0
"""Runs within a filter: noise chosen on the way, one budget for all of them, and no way around it."""

import math

import pytest
import torch

from accountants import (
    ADD_REMOVE,
    REPLACE,
    ZERO_OUT,
    BudgetExhausted,
    Gaussian,
    Ledger,
    PoissonSampled,
    Repeated,
    accountant,
    best,
    budget_filter,
    ledger_bound,
    read,
)
from accountants.methods.rdp import ORDERS
from dpopt import AdaptiveBudget, BallsInBins, Budget, GaussianMechanism, PoissonSampling, PrivacyEngine
from tests.support.dpopt.private_runs import examples, explicit, familiar, losses_of, mlp

DATA = examples(40)
RATE = 0.2


def filtered(path=None, *, epsilon=2.0, noise=2.0, **options):
    options.setdefault("budget", AdaptiveBudget(epsilon, 1e-5))
    return explicit(mlp(), noise=noise, rate=RATE, ledger=path, **options)


def step(private, *, noise=None):
    for batch in private.batches(DATA, steps=1):
        for part in batch.split(64):
            private.accumulate(losses_of(private.model, part))
        if noise is not None:
            private.mechanism = GaussianMechanism(noise)
        private.release()


def spend_all(private, noises):
    """Steps with these noises in turn until one does not fit; the noises that did."""
    done = []
    for number in range(10_000):
        noise = noises[number % len(noises)]
        try:
            step(private, noise=noise)
        except BudgetExhausted:
            private.discard()
            break
        done.append(noise)
    return done


@pytest.mark.parametrize("relation", [ADD_REMOVE, ZERO_OUT, REPLACE])
def test_guarantee_a_run_within_a_filter_may_choose_its_noise(tmp_path, relation):
    """What was charged is what ran, its Renyi divergences at the declared order are within the order's budget."""
    path = tmp_path / "ledger.jsonl"
    with filtered(path, relation=relation, epsilon=4.0) as private:
        done = spend_all(private, [3.0, 2.0, 5.0])
        assert len(done) > 5
        bound = private.bound(1e-5)
        assert (bound.epsilon, bound.delta) == (4.0, 1e-5)
        assert any("may depend on the released outputs" in text for text in bound.assumptions)
        assert any("secret key" in text for text in bound.assumptions)
        assert private.epsilon(1e-6) > 4.0
    history = read(path)
    charged = [record.event for record in history.records if record.kind == "charge"]
    assert charged == [PoissonSampled(RATE, Gaussian(noise)) for noise in done]
    order = history.rule.config["orders"][0]
    curve = accountant("rdp", relation).curve(history.events())
    spent = float(curve.values[ORDERS == order][0])
    budget = 4.0 + (math.log(1e-5) + math.log(order)) / (order - 1) - math.log1p(-1 / order)
    assert 0.8 * budget < spent <= budget
    assert best(history.events(), 1e-5).epsilon <= 4.0
    assert ledger_bound(history, 1e-5).epsilon == 4.0


def test_a_step_that_does_not_fit_releases_nothing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with filtered(path, epsilon=1.0) as private:
        step(private)
        for parameter in private.model.parameters():
            parameter.grad = None
        before = path.read_bytes()
        with pytest.raises(
            BudgetExhausted, match=r"expected a step that fits epsilon 1 .*raise the noise multiplier"
        ):
            step(private, noise=0.5)
        assert path.read_bytes() == before
        assert all(parameter.grad is None for parameter in private.model.parameters())
        private.mechanism = GaussianMechanism(4.0)  # the remedy
        private.release()
        assert private.ledger.num_charges == 2


def test_later_runs_spend_what_is_left_whatever_their_configuration(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with filtered(path) as private:
        alone = private.steps_left
        for _ in range(alone // 2):
            step(private)
    with filtered(path, noise=4.0, clip=0.5) as private:  # no new_configuration: a filter covers it
        private.mechanism = GaussianMechanism(2.0)
        left = 0
        for _ in range(alone):
            try:
                step(private)
                left += 1
            except BudgetExhausted:
                break
        assert left == alone - alone // 2
    with pytest.raises(BudgetExhausted, match=r"\d % of the filter's budget left after 0 step"):
        filtered(path).__enter__()
    assert ledger_bound(read(path), 1e-5).epsilon == 2.0


def test_steps_that_the_filter_affords_are_drawn(tmp_path):
    with filtered(tmp_path / "ledger.jsonl", epsilon=1.0, noise=4.0) as private:
        left, steps = private.steps_left, 0
        for _ in private.batches(DATA):
            private.release()
            steps += 1
        assert steps == left > 3
        assert private.steps_left == 0
        with pytest.raises(BudgetExhausted):
            next(iter(private.batches(DATA)))


def test_runs_at_a_fixed_noise_refuse_a_governed_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with filtered(path) as private:
        step(private)
    before = path.read_bytes()
    told = r"expected a ledger without a filter, .*which a filter of epsilon 2 at delta 1e-05 governs; .*AdaptiveBudget\(2.0, 1e-05\)"
    for budget in (None, Budget(2.0, 1e-5), Budget(50.0, 1e-5)):
        with pytest.raises(ValueError, match=told):
            filtered(path, budget=budget, new_configuration=True).__enter__()
    with pytest.raises(ValueError, match=told):
        familiar(
            engine=PrivacyEngine(ledger=path, new_configuration=True),
            dataset=examples(8),
            noise=1.0,
        )
    assert path.read_bytes() == before
    with filtered(path) as private:  # the remedy
        step(private)
    assert read(path).rule.epsilon == 2.0


@pytest.mark.parametrize("made", ["a run", "a charge"])
def test_a_filter_cannot_begin_on_a_used_ledger(tmp_path, made):
    path = tmp_path / "ledger.jsonl"
    if made == "a run":
        with filtered(path, budget=None) as private:
            step(private)
            unit = private.ledger.unit
        before = path.read_bytes()
        with pytest.raises(ValueError, match="a filter must be declared before the first charge"):
            filtered(path).__enter__()
        assert path.read_bytes() == before
        assert ledger_bound(read(path), 1e-5).epsilon < 2.0
        assert unit == read(path).unit
    else:
        with filtered(path) as private:
            budget_filter(2.0, 1e-5, planned=private.event, ledger=private.ledger).spend(
                Repeated(PoissonSampled(RATE, Gaussian(2.0)), private.steps_left)
            )
            with pytest.raises(BudgetExhausted):  # somebody else spent it
                step(private)


def test_another_budget_does_not_change_the_filter(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with filtered(path):
        pass
    before = path.read_bytes()
    for other in (AdaptiveBudget(3.0, 1e-5), AdaptiveBudget(2.0, 1e-6)):
        with pytest.raises(ValueError, match="the filter of a ledger must never change"):
            filtered(path, budget=other).__enter__()
    assert path.read_bytes() == before
    with filtered(path, noise=9.0, budget=AdaptiveBudget(2.0, 1e-5, planned=Gaussian(3.0))) as private:
        assert private.ledger.rule.method.startswith("renyi")  # what governs, whatever the new plan


def test_a_filter_that_nothing_fits_is_not_declared(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for noise in (0.0, 0.2):
        with pytest.raises(BudgetExhausted, match="100 % of the filter's budget left after 0 step"):
            filtered(path, noise=noise).__enter__()
        assert [record.kind for record in read(path).records] == ["header"]
    with filtered(path) as private:
        step(private)
    for odd in ((True, 1e-5), (float("nan"), 1e-5), (2.0, 0.9), (2.0, 0.0)):
        with pytest.raises(ValueError, match="must be a"):
            AdaptiveBudget(*odd)


def test_the_plan_chooses_the_order(tmp_path):
    """Noise far below the plan is dear: the least that will be used is to be planned."""
    least = PoissonSampled(0.01, Gaussian(0.6))
    orders = []
    for number, planned in enumerate((None, least)):
        with filtered(
            tmp_path / str(number), noise=8.0, budget=AdaptiveBudget(4.0, 1e-5, planned)
        ) as private:
            orders.append(private.ledger.rule.config["orders"][0])
            orders.append(private.payments.filter.affords(least))
    assert orders[2] < orders[0] and orders[3] > orders[1]


def test_what_was_drawn_otherwise_is_not_released(tmp_path):
    with filtered(tmp_path / "ledger.jsonl") as private:
        drawn_by = private.sampling
        for _ in private.batches(DATA, steps=1):
            private.sampling = PoissonSampling(0.01, 8.0)
            with pytest.raises(RuntimeError, match="expected the sampling that the run began with"):
                private.release()
            private.sampling = drawn_by
            private.release()
        private.sampling = PoissonSampling(1.0, 8.0)
        with pytest.raises(RuntimeError, match="expected the sampling that the run began with"):
            private.draw(40)
        assert private.ledger.num_charges == 1


def test_a_round_keeps_the_noise_that_it_was_paid_with(tmp_path):
    from dpopt import FlatClipper, PrivateTraining

    model = mlp()
    private = PrivateTraining(
        model, clipper=FlatClipper(1.0), mechanism=GaussianMechanism(8.0), sampling=BallsInBins(2, 20.0),
        budget=AdaptiveBudget(2.0, 1e-5), ledger=tmp_path / "ledger.jsonl",
    )  # fmt: skip
    with private:
        assert private.ledger.rule.method == "gaussian filter"
        step(private)
        with pytest.raises(RuntimeError, match="that the whole round was paid for"):
            step(private, noise=4.0)
        private.mechanism = GaussianMechanism(8.0)
        private.release()
        step(private, noise=16.0)
        assert private.ledger.num_charges == 2
        assert [p.grad is not None for p in model.parameters()] == [True] * 4


def test_secure_randomness_has_filters_too(tmp_path):
    pytest.importorskip("cryptography")
    with filtered(tmp_path / "ledger.jsonl", randomness="secure") as private:
        step(private, noise=3.0)
        step(private, noise=2.0)
        assert private.ledger.num_charges == 2
        assert any("AES-256" in text for text in private.bound(1e-5).assumptions)
    assert torch.isfinite(next(private.model.parameters()).grad).all()


def test_a_filter_of_the_ledgers_own_api_is_the_one_of_a_run(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with filtered(path) as private:
        unit, event = private.ledger.unit, private.event
        step(private)
    with Ledger.open(path, unit=unit) as ledger:
        budget = budget_filter(2.0, 1e-5, planned=Repeated(event, 9), ledger=ledger)
        assert budget.bound().epsilon == 2.0
        assert budget.affords(event) + 1 == budget_filter(2.0, 1e-5, planned=event).affords(event)
