# SPDX-License-Identifier: Apache-2.0
"""The checker on loaders: Poisson is told from what only has its mean."""

import random

import pytest
from torch.utils.data import DataLoader

from dpopt.audit.step_checks import check_step
from tests.support.dpopt.private_steps import RATE, private_step


class Batches:
    """Batches of records, drawn anew in each epoch by `draw(number of records, step)`."""

    def __init__(self, data, draw):
        self.data, self.draw = data, draw

    def __iter__(self):
        for step in range(50):
            yield [self.data[i] for i in self.draw(len(self.data), step)]


def poisson(rate):
    return lambda n, step: [i for i in range(n) if random.random() < rate]


def weighted(n, step):
    return [i for i in range(n) if random.random() < (2 * RATE if i < n // 2 else 0.0)]


def pairs(n, step):
    return [i for k in range(0, n, 2) if random.random() < RATE for i in (k, k + 1)]


def with_replacement(n, step):
    return random.choices(range(n), k=round(n * RATE))


kept: list = []


def sticky(n, step):
    """Each record stays as it was, in or out, with probability a half; the mean and each batch are Poisson's."""
    global kept
    fresh = [random.random() < RATE for _ in range(n)]
    kept = (
        fresh
        if len(kept) != n
        else [o if random.random() < 0.5 else f for o, f in zip(kept, fresh, strict=True)]
    )
    return [i for i, taken in enumerate(kept) if taken]


def loader_of(draw):
    return lambda data: Batches(data, draw)


def found(loader, **claims):
    return check_step(private_step(loader=loader, **claims), checks=("sampler",))


def faults(report):
    return {fault.check for fault in report.faults}


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 300), marks=pytest.mark.slow)])
def test_guarantee_poisson_batches_are_not_accused(seeds):
    case = private_step(loader=loader_of(poisson(RATE)))
    for seed in seeds:
        report = check_step(case, seed=seed, checks=("sampler",), steps=20)
        assert (report.faults, report.cautions) == ((), ()), (seed, str(report))


@pytest.mark.parametrize(
    "draw, checks",
    [
        (poisson(1.3 * RATE), {"sampling rate"}),
        (weighted, {"records"}),
        (pairs, {"batch sizes", "draws independent"}),
        (sticky, {"draws independent"}),
        (with_replacement, {"once per step", "batch sizes"}),
        (lambda n, step: random.sample(range(n), round(n * RATE)), {"batch sizes"}),
    ],
    ids=["more often", "weighted", "pairs", "sticky", "with replacement", "fixed size"],
)
def test_what_is_not_poisson_is_found(draw, checks):
    assert checks <= faults(found(loader_of(draw)))


def test_a_shuffled_loader_is_not_poisson_though_its_mean_is():
    report = found(lambda data: DataLoader(data, batch_size=16, shuffle=True))
    assert {"batch sizes", "records", "draws independent"} <= faults(report)
    rate = next(f for f in report.findings if f.check == "sampling rate")
    assert rate.verdict == "holds" and rate.figure == 1.0


def test_less_than_is_paid_for_is_a_caution():
    report = found(loader_of(poisson(0.7 * RATE)))
    assert "sampling rate" in {f.check for f in report.cautions}
    assert "sampling rate" not in faults(report)


def test_records_that_drop_last_never_shows_are_counted():
    report = found(lambda data: DataLoader(data, batch_size=15, drop_last=True), sampler="fixed-size")
    assert "records" in faults(report)


def test_other_laws_have_their_own_checks():
    fixed = loader_of(lambda n, step: random.sample(range(n), round(n * RATE)))
    assert faults(found(fixed, sampler="fixed-size")) == set()
    shuffled = found(lambda data: DataLoader(data, batch_size=16, shuffle=True), sampler="shuffled")
    assert faults(shuffled) == set()
    assert faults(found(fixed, sampler="shuffled")) == {"sampler"}
