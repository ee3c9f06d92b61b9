# SPDX-License-Identifier: Apache-2.0
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountants import (
    BudgetExhausted,
    Composed,
    Filter,
    Gaussian,
    Ledger,
    LedgerNotDurable,
    PoissonSampled,
    Repeated,
    UnpricedEvent,
    accountant,
    best,
    budget_filter,
    choose_order,
    leaves,
)
from accountants.dominating_pairs.gaussian import gaussian_epsilon
from accountants.methods.rdp import ORDERS
from tests.support.accountants.conformance import QUICK

STEP = PoissonSampled(0.01, Gaussian(1.0))
PLAN = Repeated(STEP, 1000)
FILTERS = {
    "R1": lambda **given: Filter.at_order(2.2, 1e-5, order=7.0, **given),
    "R2": lambda **given: Filter.over_orders(2.2, 1e-5, weights={5.0: 0.5, 9.0: 0.5}, **given),
    "R3": lambda **given: Filter.at_all_orders(2.2, 1e-5, orders=(6.0, 8.0), **given),
    "gaussian": lambda **given: Filter.of_gaussians(2.2, 1e-5, **given),
}
EVENTS = {"gaussian": Gaussian(30.0)}


def _spend_all(budget, events):
    spent = []
    for event in events:
        if not budget.would_accept(event):
            with pytest.raises(BudgetExhausted):
                budget.spend(event)
            break
        budget.spend(event)
        spent.append(event)
    return spent


@pytest.mark.parametrize("name", FILTERS)
def test_what_is_accepted_fits_the_budget(name):
    """A constant choice is a schedule too: its epsilon at the end is at most the budget."""
    budget, event = FILTERS[name](), EVENTS.get(name, STEP)
    spent = _spend_all(budget, [event] * 5000)
    assert 0 < len(spent) < 5000
    assert best(Repeated(event, len(spent)), 1e-5).epsilon <= 2.2
    assert 0 <= budget.remaining() < 0.01
    bound = budget.bound()
    assert (bound.epsilon, bound.delta) == (2.2, 1e-5)
    assert any("may depend on the released outputs" in text for text in bound.assumptions)


@QUICK
@given(st.lists(st.tuples(st.floats(0.6, 4), st.sampled_from([0.01, 0.05])), min_size=3, max_size=40))
def test_no_sequence_of_choices_overruns_the_budget(choices):
    for make in (FILTERS["R1"], FILTERS["R2"], FILTERS["R3"]):
        events = [Repeated(PoissonSampled(q, Gaussian(round(s, 1))), 20) for s, q in choices]
        spent = _spend_all(make(), events)
        assert best(Composed(tuple(spent)), 1e-5).epsilon <= 2.2


def test_one_order_loses_little_and_the_gaussian_filter_nothing():
    for epsilon, sigma in ((1, 1.513), (2, 1.022), (4, 0.778), (8, 0.616)):
        step = PoissonSampled(0.01, Gaussian(sigma))
        budget = Filter.at_order(epsilon, 1e-5, order=choose_order(Repeated(step, 1000), epsilon, 1e-5))
        assert budget.would_accept(Repeated(step, 890))
        assert not budget.would_accept(Repeated(step, 1010))
    budget = Filter.of_gaussians(3.0, 1e-5)
    count = next(n for n in range(1, 10_000) if not budget.would_accept(Repeated(Gaussian(20.0), n)))
    exact = [gaussian_epsilon(math.sqrt(n) / 20, 1e-5) for n in (count - 1, count)]
    assert exact[0] <= 3.0 < exact[1]


def test_choosing_the_order_errs_low():
    curve = accountant("rdp").curve(PLAN)
    a = ORDERS
    ideal = a[int(np.argmin(curve.values + np.log1p(-1 / a) - np.log(a * 1e-5) / (a - 1)))]
    chosen = choose_order(PLAN, curve.epsilon(1e-5), 1e-5)
    assert 0.75 * ideal <= chosen <= ideal
    assert choose_order(PLAN, curve.epsilon(1e-5), 1e-5, keep=0.5) < chosen
    # Noise below the plan: an order chosen for the plan affords next to nothing, one for the least noise does.
    plan, least = (Repeated(PoissonSampled(0.01, Gaussian(s)), 1000) for s in (1.022, 0.8176))
    some = Repeated(PoissonSampled(0.01, Gaussian(0.8176)), 40)
    assert Filter.at_order(2.0, 1e-5, order=choose_order(least, 2.0, 1e-5)).would_accept(some)
    assert not Filter.at_order(2.0, 1e-5, order=choose_order(plan, 2.0, 1e-5, keep=1.0)).would_accept(some)
    with pytest.raises(ValueError, match="epsilon must afford some order"):
        choose_order(PLAN, 1e-5, 1e-9)


# The adversary of facts/rldp.md, section 3.1: a Gaussian step, then an order chosen from its loss, then the binary
# mechanism that uses up what that order has left.
EPSILON, DELTA, ORDERS_OF_ADVERSARY, MU, SWITCH = 3.0, 1e-5, (5, 12), 0.299, 0.70


def _budget(order, delta=DELTA):
    return EPSILON + (math.log(delta) + math.log(order)) / (order - 1) - math.log1p(-1 / order)


def _binary(loss, order, left):
    """P(1) = p, Q(1) = p exp(-lam): the largest p whose divergences, both ways, are at most `left`."""
    lam = EPSILON - loss + math.log(order / (order - 1))

    def divergence(p):
        first, second = (p, 1 - p), (p * math.exp(-lam), 1 - p * math.exp(-lam))
        both = [
            sum(x**order * y ** (1 - order) for x, y in zip(*pair, strict=True))
            for pair in ((first, second), (second, first))
        ]
        return math.log(max(both)) / (order - 1)

    low, high = 1e-30, min(1.0, math.exp(lam)) * (1 - 1e-12)
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) <= left else (low, middle)
    return low, lam


def _delta_of_adversary(choose, budgets):
    nodes = np.linspace(-9, 9, 601)
    weights = np.exp(-nodes * nodes / 2) * (nodes[1] - nodes[0]) / math.sqrt(2 * math.pi)
    total = 0.0
    for z, weight in zip(nodes, weights, strict=True):
        loss = MU * MU / 2 + MU * z
        order = choose(loss)
        p, lam = _binary(loss, order, budgets[order] - order * MU * MU / 2)
        rest = math.log1p(-p) - math.log1p(-p * math.exp(-lam))
        up = max(0.0, -math.expm1(EPSILON - loss - lam))
        down = max(0.0, -math.expm1(EPSILON - loss - rest))
        total += weight * (p * up + (1 - p) * down)
    return total


def test_the_least_epsilon_over_orders_is_no_filter():
    """Rule R4: each branch alone is within budget, the choice between them is not."""
    full = {order: _budget(order) for order in ORDERS_OF_ADVERSARY}
    assert [round(full[order], 4) for order in ORDERS_OF_ADVERSARY] == [0.7473, 2.2663]

    def choose(loss):
        return 5 if loss < SWITCH else 12

    assert _delta_of_adversary(lambda _: 5, full) <= DELTA
    assert _delta_of_adversary(lambda _: 12, full) <= DELTA
    assert _delta_of_adversary(choose, full) == pytest.approx(1.5 * DELTA, rel=0.02)
    # halving delta between the orders, as over_orders does, repairs it
    shared = {order: _budget(order, DELTA / 2) for order in ORDERS_OF_ADVERSARY}
    assert _delta_of_adversary(choose, shared) <= DELTA
    with pytest.raises(
        ValueError, match="weights must add up to at most 1; got 2: the least epsilon over several"
    ):
        Filter.over_orders(EPSILON, DELTA, weights={5.0: 1.0, 12.0: 1.0})


@pytest.mark.parametrize("name", ["pld", "prv"])
def test_refuses_accountants_of_fixed_schedules(name):
    with pytest.raises(ValueError, match=f"accountant must be adaptive .*got '{name}'.*pass 'rdp'"):
        budget_filter(2.0, 1e-5, planned=PLAN, accountant=accountant(name))


def test_the_plan_chooses_the_rule():
    assert budget_filter(2.0, 1e-5, planned=Repeated(Gaussian(10.0), 9)).bound().method == "gaussian filter"
    found = budget_filter(2.0, 1e-5, planned=PLAN, accountant=accountant("rdp")).bound().method
    assert found == f"renyi filter, one order of {choose_order(PLAN, 2.0, 1e-5):g}"


@pytest.mark.parametrize("name", FILTERS)
def test_refused_before_the_release(name, tmp_path):
    with Ledger.open(tmp_path / "ledger") as ledger:
        budget, event = FILTERS[name](ledger=ledger), EVENTS.get(name, STEP)
        budget.spend(event, context={"step": 1})
        before, left = ledger.head, budget.remaining()
        dear = Gaussian(0.05)
        assert not budget.would_accept(dear)
        with pytest.raises(BudgetExhausted, match=r"must fit epsilon 2.2 .*got Gaussian.*stop here"):
            budget.spend(dear)
        assert (ledger.head, budget.remaining()) == (before, left)
        assert dict(leaves(ledger.events())) == {event: 1}


def test_charges_are_durable_and_counted_again_after_resuming(tmp_path):
    path = tmp_path / "ledger"
    with Ledger.open(path) as ledger:
        budget = FILTERS["R1"](ledger=ledger)
        for _ in range(5):
            budget.spend(Repeated(STEP, 100))
        left = budget.remaining()
    with Ledger.open(path) as ledger:
        assert ledger.num_charges == 5
        assert FILTERS["R1"](ledger=ledger).remaining() == pytest.approx(left)
        with pytest.raises(ValueError, match="filter of a ledger must never change"):
            Filter.at_order(2.2, 1e-5, order=8.0, ledger=ledger)
        assert Counter("filter" in attempt for attempt in ledger.attempts) == {True: 1}
    with Ledger.open(tmp_path / "used") as used:
        used.charge(STEP)
        with pytest.raises(ValueError, match="must be declared before the first charge; got a ledger with 1"):
            FILTERS["R1"](ledger=used)


def test_a_charge_that_failed_is_counted(tmp_path, monkeypatch):
    from accountants import storage as module

    with Ledger.open(tmp_path / "ledger") as ledger:
        budget = FILTERS["R1"](ledger=ledger)
        left = budget.remaining()

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "write_durably", fail)
        with pytest.raises(LedgerNotDurable):
            budget.spend(Repeated(STEP, 100))
        assert budget.remaining() < left


def test_no_privacy_is_refused():
    with pytest.raises(BudgetExhausted):
        FILTERS["R1"]().spend(Gaussian(0.0))
    with pytest.raises(UnpricedEvent):
        FILTERS["R2"]().would_accept(PoissonSampled(0.1, Repeated(Gaussian(1.0), 2)))
    with pytest.raises(
        ValueError, match="gaussian filter must be fed full-batch Gaussians; got PoissonSampled"
    ):
        FILTERS["gaussian"]().spend(STEP)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Filter.at_order(0.0, 1e-5, order=8.0), "epsilon must be a finite number > 0; got 0.0"),
        (lambda: Filter.at_order(1.0, 0.0, order=8.0), r"delta must be a number in \(0, 1\)"),
        (lambda: Filter.at_order(1.0, 1e-5, order=8.01), "orders must be among rdp.ORDERS"),
        (lambda: Filter.at_order(1.0, 1e-5, order=1.1), "orders must be affordable .*raise the orders"),
        (lambda: Filter.at_all_orders(1.0, 1e-5, orders=()), "orders must be among rdp.ORDERS"),
        (lambda: Filter.over_orders(1.0, 1e-5, weights={8.0: -1.0}), "orders must be among rdp.ORDERS"),
        (lambda: Filter.of_gaussians(1.0, 2.0), r"delta must be a number in \(0, 1\)"),
    ],
)
def test_refusals(make, match):
    with pytest.raises(ValueError, match=match):
        make()
