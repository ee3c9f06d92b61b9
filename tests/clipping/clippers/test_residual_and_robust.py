# SPDX-License-Identifier: Apache-2.0
"""Clippers for centred gradients and for what a first clipping cuts off: their limits and their sums."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipping import ClippedSum, FlatClipper
from clipping.clippers.residual import RestClipper, UnclippedRest
from clipping.clippers.robust import HuberClipper, NormalisedClipper

NORMS = torch.tensor([0.0, 1e-30, 1e-3, 0.3, 0.5, 0.500001, 0.8, 2.0, 2.5, 2.500001, 3.0, 1e6, 1e30])
HOSTILE = torch.tensor([math.nan, math.inf, -math.inf])

norm_values = st.one_of(
    st.floats(0, 1e4, width=32),
    st.floats(2.0**-126, 2.0**127, width=32),
    st.sampled_from([0.0, 1e-45, 1e-30, 1e-10, 1e19, 1e38, 3e38, math.inf, math.nan]),
)
sizes = st.one_of(st.floats(1e-3, 1e3), st.sampled_from([1e-30, 1e-6, 0.1, 1 / 3, 1e6, 1e30]))


def bounded(clipper, value, dtype):
    norms = torch.tensor([value], dtype=dtype)
    weight = clipper.weights(norms).item()
    assert math.isfinite(weight) and weight >= 0
    if weight:
        assert Fraction(weight) * Fraction(norms.item()) <= Fraction(clipper.sensitivity)
    return weight


@given(value=norm_values, clip_norm=sizes, mu=st.one_of(sizes, st.just(0.0)), double=st.booleans())
def test_guarantee_huber_moves_at_most_the_clip_norm(value, clip_norm, mu, double):
    bounded(HuberClipper(clip_norm, mu), value, torch.float64 if double else torch.float32)


@given(value=norm_values, clip_norm=sizes, nu=sizes, double=st.booleans())
def test_guarantee_normalised_moves_at_most_the_clip_norm(value, clip_norm, nu, double):
    bounded(NormalisedClipper(clip_norm, nu), value, torch.float64 if double else torch.float32)


@given(value=norm_values, clip_norm=sizes, first=sizes, double=st.booleans())
def test_guarantee_a_rest_moves_at_most_the_clip_norm(value, clip_norm, first, double):
    weight = bounded(RestClipper(clip_norm, first), value, torch.float64 if double else torch.float32)
    assert weight == 0 or value > first * (1 - 1e-6)


def test_huber_damps_inside_clips_outside_and_has_both_limits():
    norms = NORMS.double()
    got = HuberClipper(2.0, mu=0.5).weights(norms)
    torch.testing.assert_close(got, torch.minimum(torch.tensor(0.8).double(), 2.0 / norms))
    torch.testing.assert_close(HuberClipper(2.0, mu=0.0).weights(norms), FlatClipper(2.0).weights(norms))
    scaled = HuberClipper(2.0, mu=1e40).weights(norms)
    torch.testing.assert_close(scaled, torch.full_like(norms, 2e-40), rtol=1e-9, atol=0)


def test_huber_is_the_proximal_step_of_its_loss():
    # m + weight * (g - m) minimises huber(m - g) + |m - m0|^2 / (2 C): its gradient vanishes there.
    clip_norm, mu, start = 0.7, 0.4, torch.zeros(3, dtype=torch.float64)
    for length in (0.2, 1.0, 1.1, 5.0):
        target = length * torch.nn.functional.normalize(torch.randn(3, dtype=torch.float64), dim=0)
        weight = HuberClipper(clip_norm, mu).weights(target.norm().view(1))
        moved = (start + weight * (target - start)).requires_grad_()
        away = (moved - target).norm()
        loss = torch.where(away <= mu, away.square() / (2 * mu), away - mu / 2)
        (loss + (moved - start).square().sum() / (2 * clip_norm)).backward()
        assert moved.grad.norm() < 1e-9


def test_normalised_weights_are_those_of_weiszfeld():
    got = NormalisedClipper(nu=0.5).weights(NORMS)
    torch.testing.assert_close(got, 1 / NORMS.clamp_min(0.5), rtol=1e-5, atol=0)
    # The geometric median of three points on a line is the middle one: steps of a public size reach it.
    points, centre = torch.tensor([0.0, 1.0, 50.0], dtype=torch.float64), 20.0
    clipper = NormalisedClipper(nu=1e-3)
    for step in range(1, 4001):
        away = points - centre
        centre += 50 / step * float((clipper.weights(away.abs()) * away).sum()) / 3
    assert centre == pytest.approx(1.0, abs=0.05)


def test_first_and_rest_make_up_one_clipping_at_their_sum():
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        norms = NORMS.to(dtype)
        first, rest = FlatClipper(0.5).weights(norms), RestClipper(2.0, first=0.5).weights(norms)
        torch.testing.assert_close(first + rest, FlatClipper(2.5).weights(norms), rtol=rtol, atol=0)
        assert (rest[norms <= 0.5] == 0).all()


def test_the_rest_is_that_of_two_clippings_in_a_row():
    def clip(values, clip_norm):
        return values * (clip_norm / values.norm(dim=1, keepdim=True)).clamp_max(1)

    gradients = torch.randn(50, 4, dtype=torch.float64) * torch.logspace(-2, 2, 50).unsqueeze(1)
    weights = RestClipper(0.8, first=0.5).weights(gradients.norm(dim=1)).unsqueeze(1)
    torch.testing.assert_close(weights * gradients, clip(gradients - clip(gradients, 0.5), 0.8))
    bounded_rest = clip(gradients, 1.3) - clip(gradients, 0.5)
    torch.testing.assert_close(weights * gradients, bounded_rest, atol=1e-12, rtol=1e-9)
    assert bounded_rest.norm(dim=1).max() <= 0.8 + 1e-12


def test_first_and_unclipped_rest_make_up_the_gradient():
    norms = torch.cat((NORMS, HOSTILE))
    clipper = UnclippedRest(first=0.5)
    weights = FlatClipper(0.5).weights(norms) + clipper.weights(norms)
    torch.testing.assert_close(weights[: len(NORMS)], torch.ones(len(NORMS)), rtol=1e-5, atol=0)
    assert (weights[len(NORMS) :] == 0).all()
    assert clipper.weights(torch.tensor([1e38])).item() == pytest.approx(1.0)


def test_an_unclipped_rest_says_that_nothing_bounds_it():
    clipper = UnclippedRest(first=0.5)
    assert clipper.sensitivity == math.inf and clipper.clip_norms == (math.inf,)
    assert clipper.groups(["a", "b"]) == (("a", "b"),)
    first, hidden = (
        ClippedSum({"w": torch.ones(2)}, 0.5),
        ClippedSum({"w": torch.ones(2)}, clipper.sensitivity),
    )
    with pytest.raises(ValueError, match="two clipped sums of the same parameters and sensitivity"):
        first + hidden  # a hidden memory is not mistaken for a clipped sum


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_sizes_that_bound_nothing_are_refused(bad):
    with pytest.raises(ValueError, match=r"a finite mu >= 0; got .*; 0 clips flat"):
        HuberClipper(1.0, bad)
    with pytest.raises(ValueError, match=r"a finite nu > 0; got .*; 0.01 is usual"):
        NormalisedClipper(1.0, bad)
    for make in (lambda: RestClipper(1.0, bad), lambda: UnclippedRest(bad)):
        with pytest.raises(ValueError, match=r"a finite first > 0; got .*; give the norm at which"):
            make()
    for make in (HuberClipper, RestClipper):
        with pytest.raises(ValueError, match=r"a finite clip_norm > 0; got"):
            make(bad, 1.0)
    with pytest.raises(ValueError, match=r"a finite clip_norm > 0; got"):
        NormalisedClipper(bad)
