# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of filters: weights and budgets that are none, other relations, threads and processes."""

import copy
import math
import multiprocessing
import pickle
import sys
import threading

import numpy as np
import pytest

from accountants import (
    ADD_REMOVE,
    BY_RECORD,
    REPLACE,
    ZERO_OUT,
    BudgetExhausted,
    Composed,
    Filter,
    FixedSize,
    Gaussian,
    HiddenFeedback,
    LedgerLocked,
    OncePerEpoch,
    PoissonSampled,
    Repeated,
    TruncatedPoisson,
    UnpricedEvent,
    accountant,
    best,
    budget_filter,
    choose_order,
)
from accountants.dominating_pairs.gaussian import gaussian_epsilon
from accountants.filter_rule import declared_rule

STEP = PoissonSampled(0.01, Gaussian(1.0))
PLAN = Repeated(STEP, 1000)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "weights",
    [
        {}, None, [(5.0, 1.0)], {5.0: NAN}, {5.0: 1.0, 12.0: NAN}, {NAN: 1.0}, {5.0: INF}, {5.0: -1.0, 12.0: 2.0},
        {5.0: 0.0}, {5.0: True}, {5.0: np.bool_(True)}, {True: 1.0}, {5.0: "1"}, {"5": 1.0}, {5.01: 1.0},
        {5.0: 10**400}, {5.0: np.array([0.5])}, {5.0: 1.0, 12.0: 5e-324}, {5.0: 0.5, INF: 0.5},
    ],
)  # fmt: skip
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(
        ValueError, match=r"orders must be among rdp.ORDERS with weights > 0; got .*choose_order"
    ):
        Filter.over_orders(3.0, 1e-5, weights=weights)


@pytest.mark.parametrize("weights", [{5.0: 1.0, 12.0: 1e-13}, {5.0: 0.7, 12.0: 0.7}, {5.0: 1 + 1e-15}])
def test_weights_that_add_up_to_more_than_one_are_refused(weights):
    with pytest.raises(ValueError, match=r"weights must add up to at most 1; got 1\.\d+: the least epsilon"):
        Filter.over_orders(3.0, 1e-5, weights=weights)


@pytest.mark.parametrize("orders", [(5, 6, 7), range(5, 12), range(5, 14), range(5, 24)])
def test_equal_weights_of_any_number_of_orders_are_one(orders):
    """1 / n is rounded, upwards perhaps: what is used adds up to 1 at most, exactly."""
    from fractions import Fraction

    whole = Filter.over_orders(3.0, 1e-5, weights={a: np.float64(1) / len(orders) for a in orders})
    used = whole._rule.config["weights"]
    assert sum(map(Fraction, used)) <= 1
    assert all(type(w) is float and w == pytest.approx(1 / len(orders)) for w in used)
    again = declared_rule([{"filter": whole._rule.config}], ADD_REMOVE)
    assert again.config == whole._rule.config and (again.limits == whole._rule.limits).all()


@pytest.mark.parametrize(
    ("epsilon", "delta", "match"),
    [
        (True, 1e-5, "epsilon must be a finite number > 0; got True"),
        (NAN, 1e-5, "epsilon must be a finite number > 0; got nan"),
        (INF, 1e-5, "got inf"),
        (-1.0, 1e-5, "got -1.0"),
        ("2", 1e-5, "got '2'"),
        (1e308, 1e-5, "nobody is protected"),
        (10**400, 1e-5, "epsilon must be a finite number"),
        (2.0, True, r"delta must be a number in \(0, 1\).*got True"),
        (2.0, NAN, "delta must be a number"),
        (2.0, 0.0, "delta must be a number"),
        (2.0, -1e-5, "delta must be a number"),
        (2.0, 1e-320, "delta must be a number"),
        (2.0, 1 - 1e-16, "below one half; got 0.999.*well below 1 / number of records"),
        (2.0, 0.5, "below one half; got 0.5"),
    ],
)
def test_odd_budgets_are_refused(epsilon, delta, match):
    for make in (
        lambda: Filter.at_order(epsilon, delta, order=8.0),
        lambda: Filter.over_orders(epsilon, delta, weights={8.0: 1.0}),
        lambda: Filter.at_all_orders(epsilon, delta, orders=[8.0]),
        lambda: Filter.of_gaussians(epsilon, delta),
        lambda: budget_filter(epsilon, delta, planned=PLAN),
        lambda: choose_order(PLAN, epsilon, delta),
    ):
        with pytest.raises(ValueError, match=match):
            make()


@pytest.mark.parametrize("relation", [ADD_REMOVE, ZERO_OUT, REPLACE])
def test_what_is_accepted_fits_the_budget_under_the_relation(relation):
    cases = [
        STEP,
        PoissonSampled(0.1, Gaussian(4.0)),
        Gaussian(40.0),
        OncePerEpoch(10, BY_RECORD, Gaussian(20.0)),
    ]
    cases += [FixedSize(1, 100, Gaussian(2.0))] if relation != ADD_REMOVE else []
    for event in cases:
        budget = budget_filter(2.0, 1e-5, planned=Repeated(event, 100), relation=relation)
        assert budget.relation == relation
        count = budget.affords(event)
        tight = best(Repeated(event, count), 1e-5, relation=relation).epsilon
        assert 1.3 < tight <= 2.0
        for _ in range(min(count, 50)):
            budget.spend(event)
        assert budget.affords(event) in (count - min(count, 50), count - min(count, 50) - 1)


def test_a_record_replaced_halves_the_noise_of_full_batches():
    for relation, mu in ((ADD_REMOVE, 1 / 30), (ZERO_OUT, 1 / 30), (REPLACE, 2 / 30)):
        count = Filter.of_gaussians(3.0, 1e-5, relation=relation).affords(Gaussian(30.0))
        exact = [gaussian_epsilon(mu * math.sqrt(n), 1e-5) for n in (count, count + 1)]
        assert exact[0] <= 3.0 < exact[1]


def test_the_relation_is_the_ledgers_or_the_accountants():
    assert budget_filter(2.0, 1e-5, planned=PLAN, accountant=accountant("rdp", REPLACE)).relation == REPLACE
    with pytest.raises(ValueError, match="relation must be that of the accountant, 'replace-one'"):
        budget_filter(2.0, 1e-5, planned=PLAN, accountant=accountant("rdp", REPLACE), relation=ZERO_OUT)
    with pytest.raises(ValueError, match="relation must be one of"):
        Filter.at_order(2.0, 1e-5, order=8.0, relation="neighbours")
    with pytest.raises(UnpricedEvent, match="rate changes with the number of records"):
        budget_filter(2.0, 1e-5, planned=FixedSize(1, 100, Gaussian(1.0)))


@pytest.mark.parametrize(
    "wrap", [lambda e: e, lambda e: Repeated(e, 2), lambda e: Composed((STEP, Composed((e,))))]
)
def test_what_a_rule_cannot_price_is_refused_however_deep_it_stands(wrap):
    slipping = wrap(TruncatedPoisson(0.1, 9, 50, Gaussian(1.0)))
    inner = wrap(PoissonSampled(0.1, Repeated(Gaussian(1.0), 2)))
    for event in (slipping, inner):
        budget = Filter.at_order(2.0, 1e-5, order=8.0)
        with pytest.raises(UnpricedEvent):
            budget.spend(event)
        assert budget.remaining() == 1.0
    for event in (slipping, wrap(STEP), wrap(HiddenFeedback(0.1, 9.0, 0.1, None))):
        with pytest.raises(ValueError, match=r"a (gaussian filter|filter) must be fed"):
            Filter.of_gaussians(2.0, 1e-5).spend(event)


def test_nests_and_counts_without_end_are_refused_with_a_message():
    deep = STEP
    for _ in range(400):
        deep = Repeated(deep, 1)
    wide = STEP
    for _ in range(90):
        wide = Composed((wide, wide))
    budget = Filter.at_order(2.0, 1e-5, order=8.0)
    with pytest.raises(
        UnpricedEvent, match=r"nested at most 200 deep; got a deeper nest; count runs by one Repeated"
    ):
        budget.spend(deep)
    assert not budget.would_accept(wide)  # 2^90 steps, gone through once
    with pytest.raises(UnpricedEvent, match="at most 100000 events to be charged"):
        budget.spend(wide)
    many = Composed((STEP,) * 30_000)
    with pytest.raises(BudgetExhausted, match=r"got Composed of 30000 events with 1 of the budget left"):
        budget.spend(many)
    with pytest.raises(UnpricedEvent, match="runs of one mechanism must be at most 1e308"):
        budget.spend(Repeated(Repeated(STEP, 10**200), 10**200))
    with pytest.raises(
        ValueError, match="count must be an integer >= 0, at most 1e308; got an integer of 1329 bits"
    ):
        Repeated(STEP, 10**400)
    assert budget.remaining() == 1.0


def test_charges_far_below_the_budget_add_up():
    budget = Filter.of_gaussians(1.0, 1e-5)
    budget.spend(Repeated(Gaussian(100.0), 500))
    before = budget.remaining()
    for _ in range(1000):
        budget.spend(Gaussian(1e12))  # 1e-24 of what is spent: lost in any float sum
    assert budget.remaining() < before


def test_threads_spend_one_budget():
    limit = Filter.of_gaussians(1.0, 1e-5)._rule.limits[0]
    once = Gaussian(1.05 / math.sqrt(limit))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            budget, accepted, barrier = Filter.of_gaussians(1.0, 1e-5), [], threading.Barrier(6)

            def spend(budget=budget, accepted=accepted, barrier=barrier):
                barrier.wait()
                try:
                    budget.spend(once)
                    accepted.append(1)
                except BudgetExhausted:
                    pass

            threads = [threading.Thread(target=spend) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert accepted == [1]
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_filter_in_memory_is_spent_by_one_process():
    budget, fork = budget_filter(2.0, 1e-5, planned=PLAN), multiprocessing.get_context("fork")
    told = fork.Queue()

    def child():
        try:
            budget.spend(STEP)
            told.put("spent")
        except LedgerLocked as error:
            told.put(str(error))

    process = fork.Process(target=child)
    process.start()
    assert "whose copy would spend the budget again; spend in the parent" in told.get(timeout=20)
    process.join()
    budget.spend(STEP)


def test_a_copy_of_a_filter_has_no_budget_of_its_own():
    budget = budget_filter(2.0, 1e-5, planned=PLAN)
    twin = copy.copy(budget)
    budget.spend(Repeated(STEP, 800))
    assert not twin.would_accept(Repeated(STEP, 100))
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            duplicate(budget)
