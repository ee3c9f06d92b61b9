# SPDX-License-Identifier: Apache-2.0
"""Noise of its own scale in each group: what is charged covers what is released, and what is released is as stated."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from accountants import Gaussian, accountant
from clipping import ClippedSum, FlatClipper, Group, GroupClipper, per_layer
from dpopt import GaussianMechanism, GroupGaussianMechanism
from dpopt.mechanisms import equal_budget, least_noise, uniform
from tests.support.dpopt.private_runs import NOBODY, D, examples, explicit, familiar

ALLOCATIONS = [uniform, equal_budget, least_noise]
SMALL = 1e-7

bounds = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def p_of_scale(z):
    return 2 * min(stats.chi2.cdf(np.square(z).sum(), z.size), stats.chi2.sf(np.square(z).sum(), z.size))


def seeded(seed):
    return lambda name, device: torch.Generator().manual_seed(1000 * seed + sum(name.encode()))


def sum_of(sizes, sensitivities, shift=0.0):
    """A clipped sum of two parameters for each group, the first of which begins with `shift` sensitivities."""
    total, groups = {}, []
    for k, (size, bound) in enumerate(zip(sizes, sensitivities, strict=True)):
        total |= {f"{k}.a": torch.zeros(size, dtype=torch.float64), f"{k}.b": torch.zeros(2, 3)}
        total[f"{k}.a"][0] = shift * bound
        groups.append(Group((f"{k}.a", f"{k}.b"), bound))
    return ClippedSum(total, math.hypot(*sensitivities), tuple(groups))


def exact_delta(epsilon, mu):
    """Balle and Wang (2018), theorem 8, for noise of standard deviation 1 and sensitivity mu."""
    return stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), sensitivities=bounds, noise=st.floats(0.3, 20))
def test_guarantee_the_charge_covers_the_exact_joint_curve(allocation, data, sensitivities, noise):
    number = len(sensitivities)
    sizes = data.draw(st.lists(st.integers(0, 10**9), min_size=number, max_size=number))
    mechanism = GroupGaussianMechanism(noise, allocation)
    stds = mechanism.stds(sensitivities, sizes)
    # The worst neighbour moves each group by its whole sensitivity; in units of the noise, by the norm mu.
    mu = math.sqrt(math.fsum((c / s) ** 2 for c, s in zip(sensitivities, stds, strict=True)))
    assert mu == pytest.approx(1 / noise, rel=1e-12)
    assert mechanism.event() == Gaussian(noise) == GaussianMechanism(noise).event()
    epsilon = 1.5 / noise
    assert accountant("pld").curve(mechanism.event()).delta(epsilon) >= exact_delta(epsilon, mu) * (1 - 1e-9)


def test_guarantee_the_charge_covers_what_a_test_between_neighbours_sees():
    # The likelihood-ratio test is the best attack; half of the noise in one group would be seen by it.
    mechanism, sizes, sensitivities = GroupGaussianMechanism(1.0), [1, 40], [3.0, 0.5]
    charged = accountant("pld").curve(mechanism.event()).delta

    def loss(shift, seed, stds):
        released = mechanism.release(sum_of(sizes, sensitivities, shift), seeded(seed))
        return sum(
            float(released[f"{k}.a"][0]) * c / s**2 - c**2 / (2 * s**2)
            for k, (c, s) in enumerate(zip(sensitivities, stds, strict=True))
        )

    stds, trials = mechanism.stds(sensitivities, [7, 46]), 3000
    present, absent = (np.array([loss(x, i, stds) for i in range(trials)]) for x in (1.0, 0.0))
    for epsilon in (0.0, 0.5, 1.0, 2.0):
        hits, false = (present > epsilon).mean(), (absent > epsilon).mean()
        error = 5 * math.sqrt((1 + math.exp(2 * epsilon)) / (4 * trials))
        assert hits - math.exp(epsilon) * false <= charged(epsilon) + error
    # The test is as strong as the mechanism allows: its losses are those of a unit Gaussian pair.
    assert stats.kstest(present, "norm", args=(0.5, 1.0)).pvalue > SMALL
    assert stats.kstest(2 * present, "norm", args=(0.5, 1.0)).pvalue < SMALL


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_guarantee_every_coordinate_of_a_group_gets_the_stated_noise(allocation):
    sizes, sensitivities = [60_000, 20_000, 500], [0.2, 3.0, 1.0]
    mechanism = GroupGaussianMechanism(1.7, allocation)
    stds = mechanism.stds(sensitivities, [size + 6 for size in sizes])
    released = mechanism.release(sum_of(sizes, sensitivities), seeded(1), 4.0)
    for k, std in enumerate(stds):
        z = released[f"{k}.a"].numpy() * 4.0 / std
        assert p_of_scale(z) > SMALL > p_of_scale(1.3 * z)
        assert min(stats.kstest(z, "norm").pvalue, p_of_scale(released[f"{k}.b"].numpy() * 4.0 / std)) > SMALL


def test_the_scales_are_those_of_the_formulas():
    sensitivities, sizes, noise = [0.2, 3.0], [100, 4], 2.0
    expected = {
        uniform: [noise * math.hypot(0.2, 3.0)] * 2,
        equal_budget: [noise * 0.2 * 2**0.5, noise * 3.0 * 2**0.5],
        least_noise: [noise * math.sqrt(c * (0.2 * 10 + 3.0 * 2) / d) for c, d in ((0.2, 10), (3.0, 2))],
    }
    for allocation, stds in expected.items():
        assert GroupGaussianMechanism(noise, allocation).stds(sensitivities, sizes) == pytest.approx(stds)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), sensitivities=bounds)
def test_least_noise_is_the_least_energy_that_the_budget_allows(data, sensitivities):
    number = len(sensitivities)
    sizes = data.draw(st.lists(st.integers(1, 10**6), min_size=number, max_size=number))
    shares = data.draw(st.lists(st.floats(1e-3, 1.0), min_size=number, max_size=number))

    def energy(allocation):
        stds = GroupGaussianMechanism(1.5, allocation).stds(sensitivities, sizes)
        return math.fsum(d * s * s for d, s in zip(sizes, stds, strict=True))

    least = 1.5**2 * math.fsum(c * math.sqrt(d) for c, d in zip(sensitivities, sizes, strict=True)) ** 2
    assert energy(least_noise) == pytest.approx(least)
    for other in (uniform, equal_budget, lambda c, d: shares):
        assert energy(other) >= least * (1 - 1e-9)


def test_uniform_is_the_gaussian_mechanism():
    clipped, twin = (sum_of([50, 7], [0.3, 2.0], shift=1.0) for _ in range(2))
    mine = GroupGaussianMechanism(1.2, uniform).release(clipped, seeded(3), 8.0)
    for name, value in GaussianMechanism(1.2).release(twin, seeded(3), 8.0).items():
        torch.testing.assert_close(mine[name], value, rtol=1e-6, atol=0)


def test_no_noise_only_when_asked_for():
    released = GroupGaussianMechanism(0.0).release(sum_of([5, 5], [1.0, 2.0], shift=1.0), seeded(0), 2.0)
    assert released["1.a"].tolist() == [1.0, 0, 0, 0, 0]


@pytest.mark.parametrize("shares", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_shares_that_leave_a_group_without_noise_are_refused(shares):
    mechanism = GroupGaussianMechanism(1.0, lambda sensitivities, sizes: shares)
    with pytest.raises(
        ValueError, match=r"expected 2 finite shares > 0 of the budget, .*; got .*; correct the"
    ):
        mechanism.release(sum_of([5, 5], [1.0, 2.0]), seeded(0))


def test_what_cannot_be_noised_is_refused():
    with pytest.raises(ValueError, match=r"expected a finite noise_multiplier >= 0; got -1"):
        GroupGaussianMechanism(-1.0)
    with pytest.raises(
        ValueError, match=r"a clipped sum that knows its groups; got one without; give it groups="
    ):
        GroupGaussianMechanism(1.0).release(ClippedSum({"a": torch.zeros(3)}, 1.0), seeded(0))


def test_a_run_noises_each_layer_by_its_own_scale():
    model = nn.Sequential(nn.Linear(D, 300), nn.Linear(300, 200))
    clipper = GroupClipper(per_layer(model, 1.0).members, (FlatClipper(0.2), FlatClipper(4.0)))
    mechanism = GroupGaussianMechanism(1.5)
    stds = mechanism.stds([0.2, 4.0], [300 * (D + 1), 200 * 301])
    run = explicit(model, clipper=clipper, mechanism=mechanism, rate=NOBODY, expected=3.0, insecure_seed=1)
    with run as private:
        for _ in private.batches(examples(2), steps=1):
            private.release()
        for layer, std in zip(model, stds, strict=True):
            for p in layer.parameters():
                assert p_of_scale(p.grad.double().flatten().numpy() * 3.0 / std) > SMALL
        charged = private.epsilon(1e-5)
    with explicit(model, clipper=clipper, noise=1.5, rate=NOBODY, expected=3.0) as plain:
        for _ in plain.batches(examples(2), steps=1):
            plain.release()
        assert charged == plain.epsilon(1e-5)


@pytest.mark.parametrize("clipping", ["automatic", "psac", "per_block:automatic", "per_layer:psac"])
def test_the_familiar_door_takes_clippers_by_name(clipping):
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    engine, _, optimizer, loader = familiar(model, clipping=clipping, max_grad_norm=0.5)
    assert engine.training.sum.clipper.sensitivity == pytest.approx(0.5)
    for inputs, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        assert 0 < norm <= 0.5 * (1 + 1e-5)
