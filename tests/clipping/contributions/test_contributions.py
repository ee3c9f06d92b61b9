# SPDX-License-Identifier: Apache-2.0
"""The law of `clipping.Contribution`: whatever a gradient, a centre or a memory holds, one example moves each released
vector by at most its stated sensitivity, and all of them, divided by their noise, by at most 1 / noise_multiplier.

Gradients are given as structures: one parameter formed, the other as outer products.

Shapes: B examples.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clipping import (
    ClippedSum,
    Clipping,
    Contribution,
    Dense,
    FlatClipper,
    Measuring,
    Outer,
    Summing,
    Sums,
    per_parameter,
)
from clipping.clippers.robust import HuberClipper
from clipping.contributions.error_feedback import HiddenState
from clipping.contributions.record_memory import Memory
from dpopt import GaussianMechanism, PoissonSampling
from dpopt.estimators import Centred, Dice, Difference, Plain, Quantile, Run, Slack, named_estimator
from dpopt.estimators.slack import Ranges
from dpopt.estimators.step_mechanism import mechanism_of, scaled
from dpopt.release.release import noise_stds

C, Z, N = 0.5, 1.3, 6
SHAPES = {"a": (3,), "b": (2, 4)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(shape)) for shape in SHAPES.values())


def named(text):
    return named_estimator(text, Run(Model(), C, N, PoissonSampling(1.0, float(N))))


def grouped(rule=FlatClipper):
    return lambda clip_norm: per_parameter(Model(), [0.6 * clip_norm, 0.8 * clip_norm], rule=rule)


ESTIMATORS = {
    **{
        text: partial(named, text)
        for text in (
            "flat",
            "automatic",
            "psac",
            "schedule:steps=5,clip_end=0.3,noise_end=0.5",
            "quantile",
            "slack",
            "median",
            "huber",
            "coordinate_median",
            "geometric_median",
            "two_threshold",
            "two_threshold:rest=0.01,rate=1",
            "clip21:rate=0.7",
            "diff2",
            "diff2:smoothness=100,ratio=3",
            "dice",
            "dice:bound=2",
        )
    },
    "per parameter": lambda: Plain(Contribution(grouped()(C))),
    "per parameter, around a centre": lambda: Centred(C, grouped()),
    "per parameter, damped around a centre": lambda: Centred(C, grouped(partial(HuberClipper, mu=0.1))),
    "median without memory": lambda: Centred(C, tracked=False),
}


def vector(seed, size, exponent, kind="real"):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    values = values / values.norm() * 10.0**exponent
    if kind != "real":
        values[seed % size] = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[kind]
    return values


exponents = st.one_of(st.integers(-30, 37), st.sampled_from([-2, -1, 0, 1]))
rows = st.tuples(
    st.integers(0, 1000), exponents, st.sampled_from(["real"] * 6 + ["nan", "inf", "-inf", "centre"])
)
batches = st.lists(rows, min_size=1, max_size=4)
hostile = settings(max_examples=60)


def gradients(batch, centre, dtype):
    """(B, 3) formed and outer products of shape (2, 4); `centre` by name, which some examples hit exactly."""
    formed, left, right = [], [], []
    for seed, exponent, kind in batch:
        if kind == "centre":
            formed.append(centre["a"].double() * (1 + 1e-7 * (seed % 3)))
            u, s, v = torch.linalg.svd(centre["b"].double(), full_matrices=False)
            left.append(u[:, 0] * s[0].sqrt())
            right.append(v[0] * s[0].sqrt())
        else:
            formed.append(vector(seed, 3, exponent, kind))
            left.append(vector(seed + 1, 2, exponent / 2))
            right.append(vector(seed + 2, 4, exponent / 2))
    stacked = [torch.stack(x).to(dtype) for x in (formed, left, right)]
    outer = Outer(*(x.view(len(batch), 1, 1, -1) for x in stacked[1:]), torch.Size((2, 4)))
    return {"a": Dense(stacked[0]), "b": outer}


def summed(contribution, grads, num_examples, *, mean=False, two_pass=False):
    groups = contribution.clipper.groups(list(SHAPES))
    sums = Sums(contribution, groups, mean)
    if num_examples == 0:
        return sums
    nothing = lambda *_: None  # noqa: E731
    collectors = [Clipping(sums, lambda name: False, nothing)]
    if two_pass:
        first = Measuring(sums)
        collectors = [first, partial(Summing, sums, first, nothing)]
    for made in collectors:
        collector = made() if isinstance(made, partial) else made
        for name, value in grads.items():
            collector.ready(name, value, num_examples)
        collector.complete(num_examples)
    return sums


def size_of(contribution, name):
    count = contribution.counts.get(name)
    return (count.size,) if count is not None else SHAPES[name.rpartition(":")[2]]


def released(contribution, totals, dtype):
    """The released vectors as one sum, those that nobody reached as zeros."""
    groups = contribution.released(contribution.clipper.groups(list(SHAPES)))
    found = {
        name: totals.get(name, torch.zeros(size_of(contribution, name), dtype=dtype))
        for group in groups
        for name in group.names
    }
    return ClippedSum(found, math.hypot(*(g.sensitivity for g in groups)), groups)


def prepared(make, seed, exponent, dtype):
    """An estimator after a hostile past: every released vector has norm 10^exponent; the model has moved."""
    estimator = make()
    stage = estimator.stage(0)
    contribution = stage.contribution
    names = [n for g in contribution.released(contribution.clipper.groups(list(SHAPES))) for n in g.names]
    past = {}
    for at, name in enumerate(names):
        shape = size_of(contribution, name)
        past[name] = vector(seed + at, math.prod(shape), min(exponent, 30)).view(shape).to(dtype)
    stage.finish(past)
    if isinstance(estimator, Difference):
        for at, value in enumerate(estimator.parameters().values()):
            value.data = vector(seed + at, value.numel(), min(exponent, 15)).view_as(value).to(value.dtype)
    return estimator


def centre_of(estimator, dtype):
    held = getattr(estimator, "centre", None)
    return held or {name: torch.ones(shape, dtype=dtype) for name, shape in SHAPES.items()}


def contributions(estimator, batch, dtype, removed):
    """The stage, and what each of two neighbouring batches sums: the second lacks row `removed`."""
    stage = estimator.stage(1)
    contribution = stage.contribution
    if contribution.of_records is not None:  # a memory of its own for each record, from a step before
        past = [(seed + 7, exponent, "real") for seed, exponent, _ in batch]
        history = contribution.of_records(range(len(batch)))
        summed(history, gradients(past, centre_of(estimator, dtype), dtype), len(batch))
        estimator.memory.keep()
        contribution = estimator.stage(1).contribution
    found = []
    for keep in (range(len(batch)), [i for i in range(len(batch)) if i != removed]):
        grads = gradients([batch[i] for i in keep], centre_of(estimator, dtype), dtype) if keep else {}
        mine = contribution if contribution.of_records is None else contribution.of_records(list(keep))
        found.append((mine, grads, len(keep)))
    return stage, contribution, found


def tolerance(dtype):
    return 2e-3 if dtype == torch.float32 else 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("name", ESTIMATORS)
@hostile
@given(
    batch=batches,
    where=st.integers(0, 3),
    past=st.tuples(st.integers(0, 100), exponents),
    mean=st.booleans(),
    two_pass=st.booleans(),
)
def test_guarantee_every_contribution_keeps_its_sensitivity(name, dtype, batch, where, past, mean, two_pass):
    estimator = prepared(ESTIMATORS[name], *past, dtype)
    stage, contribution, pair = contributions(estimator, batch, dtype, where % len(batch))
    # A mean over B divides by B: neighbours differ in it, so it is undone example by example.
    options = {"two_pass": two_pass and not mean}
    sums = [
        summed(mine, scaled_by(grads, 1 / num if mean and num else 1.0), num, mean=mean, **options)
        for mine, grads, num in pair
    ]
    both = [released(contribution, x.totals, dtype) for x in sums]
    for group in both[0].groups:
        moved = math.hypot(*(float((both[0].total[n] - both[1].total[n]).norm()) for n in group.names))
        assert moved <= group.sensitivity * (1 + tolerance(dtype))
    if stage.fold is not None:  # hidden states that have nothing to do with each other
        other = prepared(ESTIMATORS[name], past[0] + 1, past[1], dtype)
        both = [
            fed(one, sign, x, s, dtype)
            for one, sign, x, s in zip((estimator, other), (1, -1), both, sums, strict=True)
        ]
    mechanism = scaled(mechanism_of(estimator, GaussianMechanism(Z), 1), math.sqrt(stage.rounds))
    stds = noise_stds(mechanism, both[0], 1.0)
    whitened = [float((both[0].total[n] - both[1].total[n]).double().norm()) / std for n, std in stds.items()]
    assert set(stds) == set(both[0].total)
    multiplier = Z * (1 if estimator.factors is None else estimator.factors(1))
    assert math.sqrt(stage.rounds) * math.hypot(*whitened) <= (1 + tolerance(dtype)) / multiplier


def scaled_by(grads, factor):
    return {
        name: Dense(value.values * factor)
        if isinstance(value, Dense)
        else Outer(value.left * factor, value.right, value.shape)
        for name, value in grads.items()
    }


def fed(estimator, sign, clipped, sums, dtype):
    """What `Dice` releases, after a hidden past that points to `sign` and fills the feedback."""
    stage = estimator.stage(1)
    past = {f"rest:{n}": 1e3 * vector(len(n), math.prod(s), 0).view(s).to(dtype) for n, s in SHAPES.items()}
    zero = {name: torch.zeros_like(value) for name, value in clipped.total.items()}
    stage.fold(ClippedSum(zero, clipped.sensitivity, clipped.groups), {n: sign * v for n, v in past.items()})
    stage.finish(zero)
    left = {name: value for name, value in sums.totals.items() if name not in clipped.total}
    return stage.fold(clipped, left)


# -- memory and hidden state ----------------------------------------------------------------------------------


def remembered(histories, *, rate=0.5, dtype=torch.float64):
    """The memory after some steps, each a list of (record, gradient's seed, exponent)."""
    memory = Memory(N, C, rate)
    for step in histories:
        contribution = memory.contribution()
        if step:
            mine = contribution.of_records([record for record, *_ in step])
            batch = [(seed, exponent, kind) for _, seed, exponent, kind in step]
            summed(mine, gradients(batch, centre_of(None, dtype), dtype), len(step))
        memory.keep()
    return memory


turns = st.lists(
    st.tuples(st.integers(0, 1000), exponents, st.sampled_from(["real"] * 3 + ["nan"])), max_size=4
)


@hostile
@given(mine=turns, others=turns, also=turns)
def test_guarantee_a_memory_holds_its_own_record_only(mine, others, also):
    def rows_of(record, steps):
        return [[(record, *step)] for step in steps]

    def together(*runs):
        length = max(map(len, runs))
        return [[run[t][0] for run in runs if t < len(run)] for t in range(length)]

    alone = remembered(rows_of(2, mine))
    crowd = remembered(together(rows_of(2, mine), rows_of(0, others), rows_of(5, also)))
    for name, shape in SHAPES.items():
        own = torch.zeros(shape) if name not in alone._rows else alone._rows[name][2]
        in_crowd = torch.zeros(shape) if name not in crowd._rows else crowd._rows[name][2]
        torch.testing.assert_close(own, in_crowd, rtol=1e-5, atol=1e-12)
        for untouched in (1, 3, 4):
            assert name not in crowd._rows or not crowd._rows[name][untouched].any()
    # what one turn changes has norm at most rate * clip_norm
    norm = math.hypot(*(float(rows[2].norm()) for rows in crowd._rows.values()))
    assert norm <= 0.5 * C * len(mine) * (1 + 1e-6)


def test_a_memory_moves_by_what_was_clipped():
    memory, seen = Memory(2, C, 0.5), torch.zeros(3).double()
    gradient = torch.tensor([3.0, 0.0, 4.0]).double()
    other = torch.zeros(1, 1, 1, 2).double()
    for _ in range(3):
        mine = memory.contribution().of_records([1])
        nothing = Outer(other, torch.zeros(1, 1, 1, 4).double(), torch.Size((2, 4)))
        summed(mine, {"a": Dense(gradient.unsqueeze(0)), "b": nothing}, 1)
        memory.keep()
        away = gradient - seen
        seen = seen + 0.5 * away * min(1.0, C / away.norm().item())
        torch.testing.assert_close(memory._rows["a"][1].double(), seen, rtol=1e-6, atol=0)
    assert not memory._rows["a"][0].any()


@hostile
@given(
    given_=st.lists(
        st.tuples(
            st.integers(0, 100),
            st.one_of(exponents, st.just(38.9)),
            st.sampled_from(["real"] * 4 + ["nan", "inf"]),
        )
    ),
    bound=st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 1e6]),
    double=st.booleans(),
)
def test_guarantee_hidden_feedback_stays_within_its_clip_norm(given_, bound, double):
    dtype = torch.float64 if double else torch.float32
    state = HiddenState(bound)
    # many parameters: together they are longer than any number of their dtype
    zero = {str(i): torch.zeros(1, dtype=dtype) for i in range(20)}
    cuts = [
        {n: x.view(1).to(dtype) for n, x in zip(zero, vector(seed, 20, exponent, kind), strict=True)}
        for seed, exponent, kind in given_
    ]
    for cut in (*cuts, {}, {}):
        added = state.give(zero, cut)
        state.keep()
        norm = math.hypot(*(float(value.double().norm()) for value in added.values()))
        assert norm <= bound


def test_hidden_feedback_gives_back_what_was_cut_off():
    state = HiddenState(1.0)
    zero = {"a": torch.zeros(2, dtype=torch.float64)}
    given_ = []
    for cut in (torch.tensor([3.0, 4.0]).double(), *[torch.zeros(2).double()] * 8):
        given_.append(state.give(zero, {"a": cut})["a"])
        state.give(zero, {"a": cut + 1})  # what is not kept has never been
        state.give(zero, {"a": cut})
        state.keep()
    assert not given_.pop(0).any()
    torch.testing.assert_close(given_[0], torch.tensor([0.6, 0.8]).double(), rtol=2e-5, atol=0)
    torch.testing.assert_close(sum(given_), torch.tensor([3.0, 4.0]).double(), rtol=1e-4, atol=0)
    assert all(value is not zero["a"] for value in given_) and not zero["a"].any()


# -- counts in the ball ---------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    clip_norm=st.sampled_from([1e-6, 0.1, 0.5, 1 / 3, 7.0, 1e6]),
    edges=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4, unique=True).map(sorted),
    part=st.one_of(st.floats(0, 1.5), st.integers(0, 3)),
    off=st.sampled_from([-1e-7, 0.0, 1e-7]),
    double=st.booleans(),
)
def test_guarantee_gradient_and_slack_stay_within_the_clip_norm(clip_norm, edges, part, off, double):
    """Norms at and beside every edge too."""
    dtype = torch.float64 if double else torch.float32
    ranges = Ranges(clip_norm, tuple(edge * clip_norm for edge in edges))
    norm = edges[part % len(edges)] * (1 + off) if isinstance(part, int) else part
    norms = torch.tensor([norm * clip_norm], dtype=dtype)
    weight = FlatClipper(clip_norm).weights(norms).double().item()
    numbers = ranges.values(norms).double()
    assert (numbers != 0).sum() <= 1
    assert math.hypot(weight * norms.double().item(), float(numbers.norm())) <= clip_norm


def test_ranges_tell_the_first_edge_that_holds_a_norm():
    ranges = Ranges(1.0, (0.4, 0.7))
    norms = torch.tensor([0.0, 0.4, 0.41, 0.7, 0.71, 5.0, math.nan, math.inf], dtype=torch.float64)
    numbers = ranges.values(norms) / torch.tensor(ranges.heights).double()
    expected = [[1, 0], [1, 0], [0, 1], [0, 1], [0, 0], [0, 0], [0, 0], [0, 0]]
    torch.testing.assert_close(numbers, torch.tensor(expected).double())


def test_an_example_without_a_norm_counts_for_nothing():
    for estimator in (Quantile(C), Slack(C)):
        contribution = estimator.stage(0).contribution
        hostile_rows = [(1, 0, "nan"), (2, 0, "inf"), (3, 5, "real")]
        found = summed(
            contribution, gradients(hostile_rows, centre_of(None, torch.float32), torch.float32), 3
        )
        (counted,) = (found.totals[name] for name in contribution.counts)
        assert torch.equal(
            counted, torch.full_like(counted, -0.5 if isinstance(estimator, Quantile) else 0.0)
        )


def test_dice_keeps_what_is_hidden_apart():
    estimator = Dice(C, feedback=0.1)
    contribution = estimator.stage(0).contribution
    groups = contribution.released(contribution.clipper.groups(list(SHAPES)))
    assert {name for group in groups for name in group.names} == set(SHAPES)
    assert "<hidden>" in repr(estimator.state)
