# SPDX-License-Identifier: Apache-2.0
"""What a ledger is worth: under the relation of its header, and by the filter that governs it; nothing else."""

import math

import pytest

from accountants import (
    ADD_REMOVE,
    REPLACE,
    ZERO_OUT,
    AdaptiveSchedule,
    Composed,
    Filter,
    FixedSize,
    Gaussian,
    Ledger,
    PoissonSampled,
    Repeated,
    UnpricedEvent,
    accountant,
    best,
    budget_filter,
    charged,
    from_dict,
    ledger_bound,
    read,
    to_dict,
)
from accountants.dominating_pairs.gaussian import gaussian_epsilon
from accountants.records import following, to_line

STEP = PoissonSampled(0.01, Gaussian(1.0))
FILTERS = {
    "one": lambda **given: Filter.at_order(2.2, 1e-5, order=7.0, **given),
    "some": lambda **given: Filter.over_orders(2.2, 1e-5, weights={5.0: 0.5, 9.0: 0.5}, **given),
    "every": lambda **given: Filter.at_all_orders(2.2, 1e-5, orders=(6.0, 8.0), **given),
    "gaussian": lambda **given: Filter.of_gaussians(2.2, 1e-5, **given),
}


def _ledger(path, relation, event=STEP, count=300):
    with Ledger.open(path, relation=relation) as ledger:
        for _ in range(count):
            ledger.charge(event)
    return path


@pytest.mark.parametrize(
    ("relation", "event"),
    [
        (ADD_REMOVE, STEP),
        (ZERO_OUT, STEP),
        (REPLACE, STEP),
        (ZERO_OUT, FixedSize(1, 100, Gaussian(1.0))),
        (REPLACE, FixedSize(1, 100, Gaussian(1.0))),
    ],
)
def test_guarantee_a_ledger_is_priced_under_its_own_relation(tmp_path, relation, event):
    path = _ledger(tmp_path / "ledger", relation, event, 20)
    truth = best(Repeated(event, 20), 1e-5, relation=relation)
    assert ledger_bound(read(path), 1e-5) == truth
    assert best(read(path).events(), 1e-5) == truth  # the events say where they come from
    assert best(charged(read(path).records), 1e-5) == truth
    with Ledger.open(path, relation=relation) as ledger:
        assert ledger_bound(ledger, 1e-5) == truth
        for name in ("pld", "prv", "rdp"):
            rule = accountant(name, relation)
            assert ledger_bound(ledger, 1e-5, accountant=rule) == rule.curve(Repeated(event, 20)).bound(1e-5)


def test_full_batches_cost_twice_where_a_record_is_replaced(tmp_path):
    path = _ledger(tmp_path / "ledger", REPLACE, Gaussian(5.0), 30)
    bound = ledger_bound(read(path), 1e-5)
    assert bound.epsilon == pytest.approx(gaussian_epsilon(2 * math.sqrt(30) / 5, 1e-5), rel=1e-6)
    assert bound.epsilon == pytest.approx(11.1918, abs=1e-4)


@pytest.mark.parametrize("name", ["pld", "prv", "rdp", "zcdp"])
def test_an_accountant_of_another_relation_refuses_the_charges_of_a_ledger(tmp_path, name):
    with Ledger.open(_ledger(tmp_path / "ledger", REPLACE, count=2), relation=REPLACE) as ledger:
        events = ledger.events()
    for nest in (events, Repeated(events, 2), Composed((STEP, Composed((Repeated(events, 1),))))):
        with pytest.raises(
            UnpricedEvent, match=r"its own relation, replace-one; got add-or-remove-one; pass"
        ):
            accountant(name).curve(nest)
        accountant(name, REPLACE).curve(nest)
    assert from_dict(to_dict(events)).relation == REPLACE
    with pytest.raises(UnpricedEvent, match="own relation"):
        best(events, 1e-5, relation=ADD_REMOVE)
    with (
        Ledger.open(tmp_path / "other") as other,
        pytest.raises(UnpricedEvent, match="own relation, replace-one"),
    ):
        other.charge(events)
    assert len(read(tmp_path / "other").records) == 1


def test_the_relation_of_a_header_may_be_told_in_words(tmp_path):
    from accountants import RELATIONS

    path = _ledger(tmp_path / "words", RELATIONS[REPLACE], count=3)
    assert ledger_bound(read(path), 1e-5) == best(Repeated(STEP, 3), 1e-5, relation=REPLACE)
    with pytest.raises(
        ValueError, match=r"relation of the ledger must be one of .*got 'by cluster'; price its"
    ):
        ledger_bound(read(_ledger(tmp_path / "odd", "by cluster", count=1)), 1e-5)


@pytest.mark.parametrize("relation", [ADD_REMOVE, ZERO_OUT, REPLACE])
@pytest.mark.parametrize("name", FILTERS)
def test_guarantee_a_governed_ledger_is_worth_its_filter(tmp_path, name, relation):
    """However the budget was used, at the delta of the filter and at others; a schedule is a use of it too."""
    path, event = tmp_path / "ledger", Gaussian(60.0) if name == "gaussian" else STEP
    with Ledger.open(path, relation=relation) as ledger:
        budget = FILTERS[name](ledger=ledger)
        assert ledger_bound(ledger, 1e-5).epsilon == 2.2  # nothing was charged: it is the promise
        count = budget.affords(event)
        assert budget.would_accept(Repeated(event, count)) and not budget.would_accept(
            Repeated(event, count + 1)
        )
        budget.spend(Repeated(event, count))
        bound = ledger_bound(ledger, 1e-5)
        assert (bound.epsilon, bound.delta) == (2.2, 1e-5) == (budget.epsilon, budget.delta)
        assert "may depend on the released outputs" in " ".join(bound.assumptions)
        for delta in (1e-9, 1e-6, 1e-5, 1e-4, 1e-2):
            spent = best(Repeated(event, count), delta, relation=relation).epsilon
            assert spent <= ledger_bound(ledger, delta).epsilon == budget.bound(delta).epsilon
        assert budget.bound(1e-6).epsilon > 2.2 >= budget.bound(1e-4).epsilon
        assert math.isinf(budget.bound(0.0).epsilon)
    assert ledger_bound(read(path), 1e-5) == bound
    with pytest.raises(
        AdaptiveSchedule, match=r"by the filter that governs it, epsilon 2.2 .*got the accountant"
    ):
        ledger_bound(read(path), 1e-5, accountant=accountant("pld", relation))


def test_the_gaussian_filter_loses_nothing_at_other_deltas():
    budget = Filter.of_gaussians(2.0, 1e-5)
    mu = math.sqrt(budget.affords(Gaussian(1000.0))) / 1000
    for delta in (1e-8, 1e-3):
        assert budget.bound(delta).epsilon == pytest.approx(gaussian_epsilon(mu, delta), rel=1e-4)


def test_more_than_a_filter_allows_is_worth_nothing(tmp_path):
    """Such a ledger was written by something else; no price of what happened stands in for the guarantee."""
    path = tmp_path / "ledger"
    with Ledger.open(path) as ledger:
        budget_filter(1.0, 1e-5, planned=Repeated(STEP, 100), ledger=ledger)
    last = read(path).records[-1]
    with path.open("ab") as file:
        for _ in range(400):
            last = following(last, "charge", {"event": to_dict(STEP), "context": {}})
            file.write(to_line(last))
    bound = ledger_bound(read(path), 1e-5)
    assert math.isinf(bound.epsilon) and bound.method == "filter overrun"
    assert "exceed what the filter of the ledger allows" in bound.assumptions[-1]
    with Ledger.open(path) as ledger:
        assert math.isinf(Filter.of_ledger(ledger).bound().epsilon)
        assert not Filter.of_ledger(ledger).would_accept(Gaussian(1e6))
