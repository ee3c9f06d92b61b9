# SPDX-License-Identifier: Apache-2.0
"""A ledger that a filter governs: whoever charges it, from wherever, meets one rule."""

import os
import subprocess
import sys
import threading

import pytest

from accountants import (
    REPLACE,
    BudgetExhausted,
    Composed,
    Filter,
    FixedSize,
    Gaussian,
    Ledger,
    LedgerCorrupt,
    LedgerLocked,
    LedgerNotDurable,
    PoissonSampled,
    Repeated,
    UnpricedEvent,
    budget_filter,
    leaves,
    ledger_bound,
    read,
    to_dict,
)
from accountants.records import following, to_line

STEP = PoissonSampled(0.01, Gaussian(1.0))
PLAN = Repeated(STEP, 1000)
BUNDLE = Repeated(STEP, 100)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "population.ledger.jsonl"


def _filter(ledger, **given):
    return budget_filter(2.0, 1e-5, planned=PLAN, ledger=ledger, **given)


def _fits(path):
    """How many bundles fit an empty ledger."""
    with Ledger.open(path.with_name("other")) as ledger:
        return _filter(ledger).affords(BUNDLE)


def test_two_filters_on_one_ledger_are_one_budget(path):
    with Ledger.open(path) as ledger:
        first, second = _filter(ledger), _filter(ledger)
        third = Filter.of_ledger(ledger)
        accepted = 0
        for number in range(30):
            try:
                (first, second, third)[number % 3].spend(BUNDLE)
                accepted += 1
            except BudgetExhausted:
                break
        assert accepted == _fits(path) == ledger.num_charges == 8
        assert first.remaining() == second.remaining() == third.remaining() < 0.1
        assert len([r for r in read(path).records if r.kind == "attempt"]) == 1


def test_direct_charges_count_and_are_held_to_the_rule(path):
    with Ledger.open(path) as ledger:
        budget = _filter(ledger)
        for _ in range(_fits(path)):
            ledger.charge(BUNDLE)
        head = ledger.head
        assert not budget.would_accept(BUNDLE)
        for charge in (ledger.charge, budget.spend):
            with pytest.raises(
                BudgetExhausted, match=r"must fit epsilon 2 at delta 1e-05 .*add noise, or stop"
            ):
                charge(BUNDLE)
        ledger.note("a remark costs nothing")
        assert (ledger.num_charges, read(path).records[-1].prev) == (8, head)
    # and in a process that has never heard of the filter
    with Ledger.open(path) as ledger, pytest.raises(BudgetExhausted):
        ledger.charge(BUNDLE)


def test_threads_of_all_kinds_spend_one_budget(path):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with Ledger.open(path) as ledger:
            ways = [_filter(ledger).spend, _filter(ledger).spend, ledger.charge]
            accepted, barrier = [], threading.Barrier(6)

            def spend(way):
                barrier.wait()
                for _ in range(6):
                    try:
                        way(BUNDLE)
                        accepted.append(1)
                    except BudgetExhausted:
                        pass

            threads = [threading.Thread(target=spend, args=(ways[i % 3],)) for i in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(accepted) == _fits(path) == ledger.num_charges
    finally:
        sys.setswitchinterval(interval)
    assert ledger_bound(read(path), 1e-5).epsilon == 2.0


SPEND = """
import sys
from accountants import *
step = PoissonSampled(0.01, Gaussian(1.0))
try:
    with Ledger.open(sys.argv[1]) as ledger:
        budget_filter(2.0, 1e-5, planned=Repeated(step, 1000), ledger=ledger).spend(Repeated(step, int(sys.argv[2])))
        print("spent")
except (BudgetExhausted, LedgerLocked) as error:
    print(type(error).__name__)
"""


def test_processes_spend_one_budget(path):
    def told(count):
        command = [sys.executable, "-c", SPEND, path, str(count)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with Ledger.open(path) as ledger:
        _filter(ledger).spend(Repeated(STEP, 500))
        assert told(300) == "LedgerLocked"
    assert [told(300), told(300)] == ["spent", "BudgetExhausted"]


def test_a_filter_is_declared_once_and_before_the_first_charge(path):
    with Ledger.open(path) as ledger:
        ledger.charge(STEP)
        with pytest.raises(ValueError, match="must be declared before the first charge; got a ledger with 1"):
            _filter(ledger)
        with pytest.raises(ValueError, match="must be governed by a filter; got one without"):
            Filter.of_ledger(ledger)
        with pytest.raises(ValueError, match="must not declare a filter by itself"):
            ledger.attempt({"filter": {"epsilon": 2.0, "delta": 1e-5, "rule": "gaussian"}})
        assert ledger.rule is None
    with Ledger.open(path.with_name("other")) as ledger:
        _filter(ledger)
        for other in (
            lambda: budget_filter(3.0, 1e-5, planned=PLAN, ledger=ledger),
            lambda: budget_filter(2.0, 1e-6, planned=PLAN, ledger=ledger),
            lambda: Filter.of_gaussians(2.0, 1e-5, ledger=ledger),
            lambda: Filter.at_order(2.0, 1e-5, order=12.0, ledger=ledger),
            lambda: Filter.over_orders(2.0, 1e-5, weights={5.0: 0.5, 12.0: 0.5}, ledger=ledger),
        ):
            with pytest.raises(
                ValueError, match=r"the filter of a ledger must never change; got .*make it as"
            ):
                other()
        with pytest.raises(ValueError, match="relation must be that of the ledger"):
            _filter(ledger, relation=REPLACE)


@pytest.mark.parametrize(
    "told",
    [
        {"epsilon": 2.0, "delta": 1e-5, "rule": "some order", "orders": [5.0, 12.0], "weights": [1.0, 1.0]},
        {"epsilon": 2.0, "delta": 1e-5, "rule": "one order", "orders": [5.0], "weights": [None]},
        {"epsilon": 2.0, "delta": 1e-5, "rule": "least epsilon"},
        {"epsilon": True, "delta": 1e-5, "rule": "gaussian"},
        {"epsilon": 2.0},
        7,
        None,
    ],
)
def test_a_declaration_that_is_no_filter_governs_nothing_and_is_refused(path, told):
    header = following(None, "header", {"format": 1, "id": "x", "unit": "record", "relation": REPLACE})
    attempt = following(header, "attempt", {"config": {"filter": told}, "event": None})
    path.write_bytes(to_line(header) + to_line(attempt))
    history = read(path)
    for ask in (lambda: Ledger.open(path, relation=REPLACE), lambda: ledger_bound(history, 1e-5)):
        with pytest.raises(
            ValueError, match=r"the filter that a ledger declares must be one that is known here; got"
        ):
            ask()


def test_a_declaration_after_the_first_charge_governs_nothing_and_is_refused(path):
    """The rule was to be fixed before anything was released; such a ledger was written by something else."""
    with Ledger.open(path) as ledger:
        _filter(ledger)
    declared = read(path).records[1].payload
    header = read(path).records[0]
    charge = following(header, "charge", {"event": to_dict(STEP), "context": {}})
    path.write_bytes(to_line(header) + to_line(charge) + to_line(following(charge, "attempt", declared)))
    history = read(path)
    for ask in (lambda: Ledger.open(path), lambda: ledger_bound(history, 1e-5)):
        with pytest.raises(
            ValueError, match="must be declared before the first charge; got a ledger with 1 charges"
        ):
            ask()


def test_two_declarations_are_refused(path):
    with Ledger.open(path) as ledger:
        _filter(ledger)
    records = read(path).records
    again = following(records[1], "attempt", records[1].payload)
    path.write_bytes(path.read_bytes() + to_line(again))
    with Ledger.open(path) as ledger:  # the same one twice is one
        assert ledger.rule.epsilon == 2.0
    other = dict(records[1].payload["config"]["filter"], epsilon=3.0)
    path.write_bytes(
        path.read_bytes() + to_line(following(again, "attempt", {"config": {"filter": other}, "event": None}))
    )
    for ask in (lambda: Ledger.open(path), lambda: read(path).rule):
        with pytest.raises(ValueError, match="not one filter"):
            ask()


@pytest.mark.parametrize("at", ["write", "fdatasync"])
def test_an_interrupted_declaration_stops_the_ledger(path, monkeypatch, at):
    """Nobody charges past a filter of which nobody knows whether it is there."""
    real = getattr(os, at)

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    with Ledger.open(path) as ledger:
        monkeypatch.setattr(os, at, interrupted)
        with pytest.raises(KeyboardInterrupt):
            _filter(ledger)
        monkeypatch.undo()
        with pytest.raises(LedgerNotDurable, match="an interruption"):
            ledger.charge(Repeated(STEP, 5000))
    with Ledger.open(path) as ledger, pytest.raises(BudgetExhausted):
        ledger.charge(Repeated(STEP, 5000))


def test_a_refused_charge_leaves_the_ledger_usable(path):
    with Ledger.open(path) as ledger:
        budget = _filter(ledger)
        deep = STEP
        for _ in range(400):
            deep = Repeated(deep, 1)
        wide = STEP
        for _ in range(60):
            wide = Composed((wide, wide))
        for event, error in (
            (Gaussian(0.0), BudgetExhausted),
            (FixedSize(2, 9, Gaussian(4.0)), UnpricedEvent),
            (deep, UnpricedEvent),
            (wide, UnpricedEvent),
        ):
            for charge in (ledger.charge, budget.spend):
                with pytest.raises(error):
                    charge(event)
        budget.spend(STEP)
        assert ledger.num_charges == 1
    assert dict(leaves(read(path).events())) == {STEP: 1}


@pytest.mark.parametrize("room", [True, False])
def test_a_torn_line_is_counted_where_the_filter_has_room(path, room):
    """Nothing was released for it, so that the guarantee stands either way."""
    with Ledger.open(path) as ledger:
        budget = _filter(ledger)
        for _ in range(3 if room else 8):
            budget.spend(BUNDLE)
        left = budget.remaining()
    with path.open("ab") as file:
        file.write(b'{"seq":%d,"kind":"charge","payload":{"ev' % len(read(path).records))
    with Ledger.open(path) as ledger:
        assert ledger.num_charges == (4 if room else 8)
        assert (Filter.of_ledger(ledger).remaining() < left) == room
        assert ledger_bound(ledger, 1e-5).epsilon == 2.0
    assert read(path).records[-1].kind == ("charge" if room else "note")


def test_a_torn_first_charge_of_a_governed_ledger_is_priced_by_what_is_expected(path):
    with Ledger.open(path) as ledger:
        _filter(ledger)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq":2,"kind":"ch')
    with pytest.raises(LedgerCorrupt, match="event is unknown"):
        Ledger.open(path)
    with Ledger.open(path, expected=BUNDLE) as ledger:
        assert dict(leaves(ledger.events())) == {STEP: 100}


def test_a_second_writer_is_refused_through_any_name(path):
    with Ledger.open(path) as ledger:
        _filter(ledger)
        path.with_name("link").hardlink_to(path)
        path.with_name("symbolic").symlink_to(path.name)
        for name in ("link", "symbolic"):
            with pytest.raises(LedgerLocked):
                Ledger.open(path.with_name(name))
        ledger.charge(STEP)  # a name more does no harm
