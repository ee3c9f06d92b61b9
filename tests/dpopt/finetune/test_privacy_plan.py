# SPDX-License-Identifier: Apache-2.0
"""The plan is priced from above, fits its budget, and counts what the ledger held before."""

import math
from pathlib import Path

import pytest

import dpopt
from accountants import BudgetExhausted, Gaussian, Ledger, PoissonSampled
from clipping import Contribution, FlatClipper
from dpopt.estimators import Plain
from dpopt.finetune.privacy_plan import PrivacyPlan, default_delta, plan_privacy


def plan(ledger: Path, **changes) -> PrivacyPlan:
    settings = {
        "num_records": 1000,
        "batch_size": 50,
        "steps": 40,
        "epsilon": 3.0,
        "delta": None,
        "noise_multiplier": None,
        "accountant_name": "rdp",
        "ledger": ledger,
        "estimator": Plain(Contribution(FlatClipper(1.0))),
    }
    return plan_privacy(**(settings | changes))


def spend(path: Path, count: int) -> None:
    with Ledger.open(path) as ledger:
        for _ in range(count):
            ledger.charge(PoissonSampled(0.05, Gaussian(1.0)))


@pytest.mark.parametrize(
    ("number", "delta"), [(2, 0.1), (60, 1e-3), (500, 1e-3), (501, 1e-4), (14_589, 1e-5)]
)
def test_the_default_delta_is_a_power_of_ten_below_one_record(number: int, delta: float) -> None:
    assert default_delta(number) == delta
    assert delta < 1 / number


def test_the_noise_is_the_smallest_for_the_budget(tmp_path: Path) -> None:
    found = plan(tmp_path / "none")
    assert 2.95 < found.epsilon <= 3.0
    wanted = dpopt.noise_multiplier(epsilon=3.0, delta=1e-4, sampling_rate=0.05, steps=40, accountant="rdp")
    assert found.noise_multiplier == wanted


def test_a_noise_without_a_budget_has_a_price_only(tmp_path: Path) -> None:
    found = plan(tmp_path / "none", epsilon=None, noise_multiplier=0.8)
    assert found.budget is None
    assert found.epsilon == dpopt.epsilon(
        noise_multiplier=0.8, sampling_rate=0.05, steps=40, delta=1e-4, accountant="rdp"
    )
    assert math.isinf(plan(tmp_path / "none", epsilon=None, noise_multiplier=0.0).epsilon)


def test_earlier_charges_are_counted(tmp_path: Path) -> None:
    spend(tmp_path / "ledger", 20)
    found = plan(tmp_path / "ledger")
    assert found.num_spent == 20
    assert 2.9 < found.epsilon <= 3.0
    assert found.noise_multiplier > plan(tmp_path / "none").noise_multiplier
    assert found.prices()(0) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"noise_multiplier": 0.5},
            r"expected 40 steps at noise multiplier 0.5 to fit epsilon 3 .*raise the noise",
        ),
        (
            {"epsilon": 1e-9},
            r"expected a budget that leaves a signal; got epsilon 1e-09, whose noise .*raise",
        ),
    ],
)
def test_an_impossible_budget_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(BudgetExhausted, match=message):
        plan(tmp_path / "none", **changes)


def test_a_spent_ledger_is_refused(tmp_path: Path) -> None:
    spend(tmp_path / "ledger", 60)
    with pytest.raises(
        BudgetExhausted, match=r"expected room within epsilon 1 .*spent already on the ledger"
    ):
        plan(tmp_path / "ledger", epsilon=1.0)


def test_prices_on_the_way_are_upper_bounds_that_end_at_the_plan(tmp_path: Path) -> None:
    found = plan(tmp_path / "none", steps=100)
    price = found.prices()
    for step in (0, 1, 3, 50, 99, 100):
        true = dpopt.epsilon(
            noise_multiplier=found.noise_multiplier,
            sampling_rate=0.05,
            steps=step,
            delta=1e-4,
            accountant="rdp",
        )
        assert true <= price(step) <= found.epsilon
    assert price(0) == 0
    assert price(100) == found.epsilon


def test_a_delta_above_one_record_is_refused_unless_asked_for_by_name(tmp_path: Path) -> None:
    for changes in ({}, {"epsilon": None, "noise_multiplier": 1.0}):
        with pytest.raises(
            ValueError, match=r"expected delta of at most 1 / number of records, 0.001; got 0.002"
        ):
            plan(tmp_path / "none", delta=0.002, **changes)
        assert plan(tmp_path / "none", delta=0.001, **changes).delta == 0.001
        assert plan(tmp_path / "none", delta=0.002, allow_large_delta=True, **changes).delta == 0.002


@pytest.mark.parametrize("sampler", ["poisson", "truncated-poisson", "fixed-size"])
def test_a_delta_that_covers_all_who_are_drawn_is_refused_even_then(sampler: str, tmp_path: Path) -> None:
    settings = {
        "delta": 0.5, "allow_large_delta": True, "steps": 5, "sampler": sampler,
        "relation": "replace-one" if sampler == "fixed-size" else "add-or-remove-one",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"expected a delta below 0.226, the probability that the run draws"):
        plan(tmp_path / "none", **settings)
    assert plan(tmp_path / "none", **settings | {"delta": 0.01}).noise_multiplier > 0.1
