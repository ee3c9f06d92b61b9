# SPDX-License-Identifier: Apache-2.0
"""Every sampler end to end: what is drawn, what is charged for it, what it costs, and what a crash costs."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accountants import (
    ADD_REMOVE,
    Composed,
    Gaussian,
    Repeated,
    UnpricedEvent,
    accountant,
    charged,
    read,
)  # fmt: skip
from dpopt import (
    Budget,
    BudgetExhausted,
)  # fmt: skip
from dpopt.budget.payments import Rounds
from dpopt.sampling.registry import SAMPLERS
from tests.support.dpopt.sampler_cases import CASES, NOISE, N, Numbers, data_of, records, release, run


def test_every_sampler_is_covered():
    assert set(CASES) == set(SAMPLERS)


@pytest.mark.parametrize("randomness", ["fast", "secure"])
@pytest.mark.parametrize("name", CASES)
def test_guarantee_a_round_is_paid_for_once_and_before_its_first_release(name, randomness, tmp_path):
    sampling, relation = CASES[name]
    path, length = tmp_path / "ledger.jsonl", sampling.steps_per_charge
    steps, seen = 2 * length + 1, []
    with run(sampling, relation, ledger=path, randomness=randomness) as private:
        for _ in private.batches(data_of(name), steps=steps):
            private.release()
            seen.append([record["kind"] for record in records(path)])
        paid = math.ceil(steps / length)
        event = sampling.event(Gaussian(NOISE))
        assert private.ledger.events() == Composed((Repeated(event, paid),))
        assert (
            private.epsilon(1e-5)
            == accountant("rdp", relation).curve(Repeated(event, paid)).epsilon(1e-5)
            < math.inf
        )
    expected = ["note" if step % length else "charge" for step in range(steps)]
    assert seen == [expected[: step + 1] for step in range(steps)]
    assert read(path).records[0].payload["relation"] == relation
    assert read(path).records[0].payload["unit"] == (
        "user" if name == "users" else "one record of the dataset"
    )


@pytest.mark.parametrize("name", ["balls-in-bins", "shuffled", "cyclic"])
@pytest.mark.parametrize("randomness", ["fast", "secure"])
def test_draws_never_repeat_within_a_round_and_differ_between_rounds(name, randomness, tmp_path):
    sampling, relation = CASES[name]
    length = sampling.steps_per_charge
    with run(sampling, relation, ledger=tmp_path / "l", randomness=randomness) as private:
        drawn = release(private, Numbers(), 3 * length)
    rounds = [drawn[i : i + length] for i in range(0, 3 * length, length)]
    assert all(sorted(sum(batches, ())) == list(range(N)) for batches in rounds)
    assert all((a == b) == (name == "cyclic") for a, b in pairwise(rounds))


def noise_domains(monkeypatch):
    """What every noise generator is keyed by, as it is drawn."""
    from dpopt.release import randomness_tiers as tiers

    found = []

    def watched(source):
        def keyed(key, use, *domain, **device):
            found.append((key.secret, use, *domain))
            return source(key, use, *domain, **device)

        return keyed

    monkeypatch.setattr(tiers, "generator", watched(tiers.generator))
    monkeypatch.setattr(tiers, "cipher_key", watched(tiers.cipher_key))
    return found


@pytest.mark.parametrize("randomness", ["fast", "secure"])
def test_a_run_that_ends_in_a_round_has_paid_for_it_and_the_next_pays_again(
    tmp_path, monkeypatch, randomness
):
    sampling, relation = CASES["shuffled"]
    path, domains, drawn = tmp_path / "ledger.jsonl", noise_domains(monkeypatch), []
    for _ in range(2):
        with run(sampling, relation, ledger=path, randomness=randomness) as private:
            drawn.append(release(private, Numbers(), 2))  # of 3: the first run dies in its epoch
    assert [record["kind"] for record in records(path)] == ["charge", "note"] * 2
    assert charged(read(path).records) == Composed((Repeated(sampling.event(Gaussian(NOISE)), 2),))
    noise = [domain for domain in domains if domain[1] == "noise"]
    assert len(set(noise)) == len(noise) and len({secret for secret, *_ in domains}) == 2
    # One domain for each release and parameter, none of them twice on the ledger, whatever the key.
    assert len({domain[1:] for domain in noise}) == 4 * 4
    assert drawn[0] != drawn[1]


def test_two_entries_of_one_run_are_two_rounds(tmp_path):
    sampling, relation = CASES["shuffled"]
    private = run(sampling, relation, ledger=tmp_path / "l")
    with private:
        first = release(private, Numbers(), 2)
    with private:
        assert release(private, Numbers(), 2) != first
        assert private.ledger.num_charges == 2


def test_guarantee_no_draw_is_released_twice(tmp_path):
    sampling, relation = CASES["shuffled"]
    with run(sampling, relation, ledger=tmp_path / "l") as private:
        first, second = private.draw(N), private.draw(N)
        private.begin(first.number, len(first.indices))
        private.release()
        with pytest.raises(RuntimeError, match="got one that is past"):
            private.begin(first.number, len(first.indices))
        private.begin(second.number, len(second.indices))
        private.sum.admission.num_drawn = None
        with pytest.raises(RuntimeError, match="expected a batch drawn since"):
            private.release()
        with pytest.raises(RuntimeError, match="got one that is past"):
            private.begin(99, 1)
        with pytest.raises(RuntimeError, match="one dataset for the whole round"):
            private.draw(N - 1)


def test_a_draw_passed_over_does_not_move_the_charges_into_the_next_round(tmp_path):
    sampling, relation = CASES["shuffled"]  # rounds of 3
    path = tmp_path / "l"
    with run(sampling, relation, ledger=path) as private:
        for wanted in (True, False, False, True, False, True, True):
            draw = private.draw(N)
            if wanted:
                private.begin(draw.number, len(draw.indices))
                private.release()
    kinds = [
        (r["kind"], r["payload"]["context"]["round"], r["payload"]["context"]["place"]) for r in records(path)
    ]
    assert kinds == [("charge", 0, 0), ("charge", 1, 0), ("note", 1, 2), ("charge", 2, 0)]


@given(length=st.integers(1, 5), released=st.lists(st.booleans(), max_size=30), most=st.integers(0, 8))
@settings(deadline=None)
def test_steps_left_are_those_that_can_be_released(length, released, most):
    rounds = Rounds(length)
    for wanted in released:
        draw = rounds.next(N)
        if not wanted:
            continue
        if not rounds.is_paid(draw):
            if rounds.charged == most:
                break
            rounds.pay(draw)
        rounds.close(draw)
    rounds.drawn = rounds.over  # draws that nobody began can still be begun
    told, found = rounds.steps(most - rounds.charged), 0
    while True:
        draw = rounds.next(N)
        if not rounds.is_paid(draw):
            if rounds.charged == most:
                break
            rounds.pay(draw)
        rounds.close(draw)
        found += 1
    assert found == told


def test_a_budget_counts_rounds_and_lets_a_paid_one_end(tmp_path):
    sampling, relation = CASES["shuffled"]
    event = sampling.event(Gaussian(NOISE))
    two = accountant("rdp", relation).curve(Repeated(event, 2)).epsilon(1e-5)
    with run(sampling, relation, ledger=tmp_path / "l", budget=Budget(two * 1.01, 1e-5)) as private:
        assert private.steps_left == 6
        release(private, Numbers(), 4)
        assert private.steps_left == 2 and private.ledger.num_charges == 2
        assert len(release(private, Numbers(), None)) == 2
        assert private.steps_left == 0
        with pytest.raises(BudgetExhausted, match="room for 0"):
            next(private.batches(Numbers(), steps=1))
        assert private.epsilon(1e-5) <= two * 1.01


@pytest.mark.parametrize(
    ("name", "relation"), [("shuffled", ADD_REMOVE), ("cyclic", ADD_REMOVE), ("fixed-size", ADD_REMOVE)]
)
def test_a_sampler_without_a_price_under_the_relation_is_refused_at_once(name, relation, tmp_path):
    with pytest.raises(UnpricedEvent, match="proven price under add-or-remove-one"):
        run(CASES[name][0], relation)
    assert not (tmp_path / "privacy-ledgers").exists()
