# SPDX-License-Identifier: Apache-2.0
"""Gradients clamped coordinate by coordinate, formed a chunk at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipping import Dense, FlatClipper, Outer, Rows, Sum
from clipping.gradients.clamped import Clamped
from clipping.gradients.shifted import Shifted


def outer(num_examples=3, width=(6, 4), positions=5, size=1.0):
    left, right = (size * torch.randn(num_examples, 1, positions, n) for n in width)
    return Outer(left, right, torch.Size(width))


@given(
    bound=st.sampled_from([1e-30, 1e-6, 0.1, 1 / 3, 0.7, 1e6, 1e30]),
    size=st.sampled_from([1e-15, 1e-3, 1.0, 1e3, 1e6]),
    positions=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_guarantee_a_clamped_norm_is_at_most_the_corner(bound, size, positions, seed):
    torch.manual_seed(seed)
    grads = Clamped(outer(2, positions=positions, size=size), bound)
    assert (grads.dense().double().abs() <= bound).all()  # rounded down: 0.1 is no float32
    norms = grads.sq_norm().double().sqrt()
    assert (norms <= bound * math.sqrt(24) * (1 + 1e-6)).all()
    meant = Clamped(Outer(grads.grads.left.double(), grads.grads.right.double(), grads.shape), bound).dense()
    true = meant.flatten(1).norm(dim=1)
    assert (norms >= true * (1 - 1e-6)).all() or true.max() < 1e-19


@pytest.mark.parametrize("grads", [outer(), outer(positions=1), Dense(torch.randn(3, 7))])
def test_an_infinite_bound_clamps_nothing(grads):
    same = Clamped(grads, math.inf)
    torch.testing.assert_close(same.dense(), grads.dense())
    torch.testing.assert_close(same.sq_norm(), grads.sq_norm(), rtol=1e-4, atol=0)
    weights = torch.rand(3)
    torch.testing.assert_close(same.weighted_sum(weights), grads.weighted_sum(weights))


def test_chunks_mean_the_same_and_stay_under_the_cap(monkeypatch):
    grads = Sum((outer(7), Rows(torch.randint(0, 6, (7, 2)), torch.randn(7, 2, 4), 6)))
    clamped, weights, direction = Clamped(grads, 0.5), torch.rand(7), torch.randn(7, 6, 4)

    def answers():
        return (
            clamped.sq_norm(),
            clamped.weighted_sum(weights),
            clamped.inner(direction[0]),
            clamped.inner(direction),
        )

    whole = answers()
    seen = []
    plain = Sum.dense
    monkeypatch.setattr(Sum, "dense", lambda self: seen.append(self.num_examples) or plain(self))
    for cap, at_once in ((60, 2), (1, 1)):
        monkeypatch.setattr("clipping.rounding.norms.CHUNK_ELEMENTS", cap)
        seen.clear()
        for got, expected in zip(answers(), whole, strict=True):
            torch.testing.assert_close(got, expected)
        assert max(seen) == at_once and len(seen) == 4 * math.ceil(7 / at_once)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_coordinate_that_is_not_finite_drops_its_example(bad):
    values = torch.randn(3, 5)
    values[1, 2] = bad
    grads = Clamped(Dense(values), 0.5)
    finite = torch.isfinite(grads.sq_norm())
    assert finite.tolist() == [True, False, True]
    expected = values[[0, 2]].clamp(-0.5, 0.5).sum(0)
    torch.testing.assert_close(grads.masked(finite).weighted_sum(finite.float()), expected)


def test_a_huge_coordinate_is_clamped_like_any_other():
    grads = Clamped(Dense(torch.tensor([[3e38, -3e38, 0.1]])), 0.5)
    assert grads.dense().tolist() == [[0.5, -0.5, pytest.approx(0.1)]]
    weight = FlatClipper(0.3).weights(grads.sq_norm().sqrt())
    # How far it is rounded up is unknown beside such terms, so it counts as long as the corner.
    assert weight.item() == pytest.approx(0.3 / (0.5 * math.sqrt(3)))
    assert 0.2 < grads.weighted_sum(weight).norm() <= 0.3


def test_around_a_centre_it_is_the_step_to_the_median_of_coordinates():
    grads, centre = outer(), torch.randn(6, 4)
    got = Clamped(Shifted(grads, centre), 0.2).weighted_sum(torch.ones(3))
    expected = (grads.dense() - centre).clamp(-0.2, 0.2).sum(0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_it_adds_into_a_total():
    into, grads = torch.ones(6, 4), Clamped(outer(), 0.2)
    assert grads.weighted_sum(torch.ones(3), into) is into
    torch.testing.assert_close(into, 1 + grads.dense().sum(0))
    assert Clamped(outer(0), 0.2).weighted_sum(torch.ones(0), into) is into
    assert Clamped(outer(0), 0.2).sq_norm().shape == Clamped(outer(0), 0.2).inner(into).shape == (0,)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(ValueError, match=r"a bound > 0 on each coordinate; got .*; choose the largest size"):
        Clamped(outer(), bound)
