# SPDX-License-Identifier: Apache-2.0
"""Gradients less a public centre: the norm bounds the difference, also where both nearly cancel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipping import Convolved, Dense, FlatClipper, Outer, Routed, Rows, Sum
from clipping.gradients.convolved import Geometry
from clipping.gradients.shifted import SQUARES, Shifted, shifted
from clipping.rounding.grams import Workspace
from clipping.rounding.norms import row_sq_norm

EPS = torch.finfo(torch.float32).eps


def _outer(width, positions, cancel):
    """Positions that add up (cancel = 0) or cancel but for a part of `cancel` of each."""
    left, right = (
        torch.randn(1, 1, positions, width[0]),
        torch.randn(1, 1, 1, width[1]).repeat(1, 1, positions, 1),
    )
    if cancel:
        signs = torch.tensor([1.0, -1.0] * (positions // 2)).view(1, 1, -1, 1)
        left = left[:, :, :1] * signs
        right = right * (1 + cancel * torch.randn(1, 1, positions, 1))
    return Outer(left, right, torch.Size(width))


def _rows(width, positions, cancel):
    indices = torch.randint(0, 2, (1, positions // 2)).repeat_interleave(2, 1)
    signs = torch.tensor([1.0, -1.0 if cancel else 1.0] * (positions // 2)).view(1, -1, 1)
    spread = 1 + (cancel or 1.0) * torch.randn(1, positions, 1)
    return Rows(indices, torch.randn(1, 1, width[1]) * signs * spread, width[0])


def _routed(width, positions, cancel):
    made = _outer(width, positions, cancel)
    return Routed(torch.zeros(1, positions, dtype=torch.long), made.left[:, 0], made.right[:, 0], 2)


def _convolved(width, positions, cancel):
    values, grad = torch.randn(1, width[1], positions), torch.randn(1, width[0], positions)
    if cancel:
        values[:, :, 1::2] = -values[:, :, ::2] * (1 + cancel * torch.randn(1, 1, positions // 2))
        grad[:, :, 1::2] = grad[:, :, ::2]
    shape = torch.Size((width[0], width[1], 1))
    return Convolved(values, grad, shape, Geometry((1,), (1,), (0,), (1,), 1))


MAKERS = {
    "dense": lambda *given: Dense(_outer(*given).dense()),
    "outer": _outer,
    "rows": _rows,
    "routed": _routed,
    "convolved": _convolved,
    "sum": lambda *given: Sum((_outer(*given), _rows(*given))),
}


def exact(grads):
    """The gradients in float64, from the numbers that the structure holds."""
    match grads:
        case Dense():
            return grads.values.double()
        case Outer():
            return Outer(grads.left.double(), grads.right.double(), grads.shape).dense()
        case Rows():
            return Rows(grads.indices, grads.values.double(), grads.num_rows).dense()
        case Routed():
            return Routed(grads.experts, grads.left.double(), grads.right.double(), grads.num_experts).dense()
        case Convolved():
            return Convolved(grads.values.double(), grads.grad.double(), grads.shape, grads.geometry).dense()
        case Sum():
            return torch.stack([exact(part) for part in grads.parts]).sum(0)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(MAKERS)),
    width=st.sampled_from([(4, 4), (32, 24), (96, 64)]),
    positions=st.sampled_from([2, 8, 64]),
    cancel=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 1e-1]),
    aim=st.sampled_from([0.0, 0.5, 1.0, 1 + 1e-6, 1 + 1e-3, 2.0, -1.0]),
    off=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0]),
    long=st.sampled_from([1e-9, 1e-3, 1.0, 1e3, 1e9, 1e15]),
    each=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_guarantee_a_shifted_norm_bounds_the_difference(
    kind, width, positions, cancel, aim, off, long, each, seed
):
    # The centre lies on the gradient, off it by an angle or a length, at every size of what cancels inside.
    torch.manual_seed(seed)
    grads = MAKERS[kind](width, positions, cancel)
    match grads:
        case Dense() | Rows():
            grads = type(grads)(*_scaled(grads, long))
        case _:
            long = 1.0
    meant = exact(grads)
    noise = torch.randn_like(meant[0])
    centre = (aim * meant[0] + off * meant.norm() / noise.norm() * noise).float()
    moved = Shifted(grads, centre.unsqueeze(0) if each else centre)
    true = (meant - centre.double()).norm().item()
    clipper = FlatClipper(0.01)
    weight = clipper.weights(moved.sq_norm().sqrt())
    assert weight.item() * true <= clipper.clip_norm * (1 + 1e-6)
    entered = moved.weighted_sum(weight).double().norm().item()
    assert entered <= clipper.clip_norm * (1 + 1e-5)


def _scaled(grads, factor):
    match grads:
        case Dense():
            return (grads.values * factor,)
        case Rows():
            return grads.indices, grads.values * factor, grads.num_rows


@pytest.mark.parametrize("side", ["wide", "narrow"])
@pytest.mark.parametrize("value", [1.1, 1 / 3, 1.9999, "spikes"])
def test_guarantee_numbers_chosen_to_round_one_way_are_bounded(side, value):
    # Every product rounds alike: the error grows with the length of the sum, not with its square root.
    width = (8, 30000) if side == "wide" else (30000, 8)
    fill = torch.full((30000,), 2.4e-4 if value == "spikes" else value)
    fill[::500] = 1.0 if value == "spikes" else value
    long, short = fill.view(1, 1, 1, -1), torch.full((1, 1, 1, 8), 0.7)
    grads = Outer(*((short, long) if side == "wide" else (long, short)), torch.Size(width))
    meant = exact(grads)
    centre = meant[0].float()
    norm = Shifted(grads, centre).sq_norm().sqrt().item()
    assert norm >= (meant - centre.double()).norm().item()
    error = abs(grads.inner(centre).double() - (meant * centre.double()).sum()).item()
    assert error <= grads.rounding().item() * centre.double().norm().item()


@pytest.mark.parametrize("length", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("lanes", [1, 16, 64])
def test_guarantee_terms_that_vanish_beside_others_are_bounded(length, lanes):
    # Tails below half an epsilon vanish beside the ones they are added to; the ones cancel, the tails are left.
    size, positions = 512, 520
    left, right = torch.zeros(2, 1, 1, positions, size)
    right[0, 0, :2] = 1.0
    left[0, 0, 0] = -2.9e-8 * lanes
    left[0, 0, 0, :lanes], left[0, 0, 1, :lanes] = -1.0, 1.0
    grads = Outer(left, right, torch.Size((size, size)))
    meant = exact(grads)
    centre = torch.full((size, size), float(length * meant.norm() / size))
    norm = Shifted(grads, centre).sq_norm().double().sqrt().item()
    assert norm >= (meant - centre.double()).norm().item()


@pytest.mark.parametrize("factor", [0.0, 1e-6, 1 - 1e-3, 1 + 1e-3, 1e3])
def test_guarantee_squares_that_round_down_are_bounded(factor):
    grads = Rows(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1, 4096), 1 / 3), 1)
    centre = torch.full((1, 4096), factor / 3)
    true = (exact(grads) - centre.double()).square().sum()
    assert Shifted(grads, centre).sq_norm().double() >= true
    if factor == 0:
        assert grads.sq_norm().double() < true  # what the margin is for


def test_the_margins_cover_measured_rounding():
    for size in (3, 700, 4096, 50257, 1 << 20):
        for fill in (1.25, 1.1, 1 / 3, 0.7, 1.9999):
            values = torch.full((1, size), fill)
            true = values.double().square().sum()
            assert abs(row_sq_norm(values).double() / true - 1) <= SQUARES / 2 * EPS
            inner = Dense(values).inner(values[0]).double()
            assert abs(inner - true) <= Dense(values).rounding().double() * values.double().norm()


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_a_centre_of_zero_is_the_plain_structure(kind):
    grads = MAKERS[kind]((32, 24), 8, 0.0)
    moved = Shifted(grads, torch.zeros(grads.shape))
    torch.testing.assert_close(moved.sq_norm(), grads.sq_norm(), rtol=1e-4, atol=0)
    assert (moved.sq_norm() >= grads.sq_norm()).all()
    assert torch.equal(moved.weighted_sum(torch.ones(1)), grads.weighted_sum(torch.ones(1)))
    assert torch.equal(moved.dense(), grads.dense())


def test_a_large_clip_norm_gives_the_plain_sum_less_the_centres():
    left, right = (torch.randn(5, 1, 3, n, dtype=torch.float64) for n in (6, 4))
    grads, centre = Outer(left, right, torch.Size((6, 4))), torch.randn(6, 4, dtype=torch.float64)
    moved = Shifted(grads, centre)
    weights = FlatClipper(1e9).weights(moved.sq_norm().sqrt())
    torch.testing.assert_close(moved.weighted_sum(weights), grads.dense().sum(0) - 5 * centre)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_an_example_that_is_masked_brings_neither_gradient_nor_centre(each, bad):
    left, right = torch.randn(3, 1, 2, 6), torch.randn(3, 1, 2, 4)
    left[1] = bad
    right[1] = bad
    centre = torch.randn(3, 6, 4) if each else torch.randn(6, 4)
    if each:
        centre[1] = bad
    moved = Shifted(Outer(left, right, torch.Size((6, 4))), centre)
    finite = torch.isfinite(moved.sq_norm())
    assert finite.tolist() == [True, False, True]
    kept = moved.masked(finite)
    assert kept.sq_norm()[1] == 0 and kept.dense()[1].eq(0).all() and kept.inner(torch.ones(6, 4))[1] == 0
    weights = torch.tensor([0.5, 0.0, 2.0])
    expected = 0.5 * moved.dense()[0] + 2 * moved.dense()[2]
    torch.testing.assert_close(kept.weighted_sum(weights), expected)
    # A weight of another number must not bring the centre back.
    torch.testing.assert_close(kept.weighted_sum(torch.tensor([0.5, 9.0, 2.0])), expected)
    assert torch.equal(kept.masked(torch.tensor([True, True, False])).dense()[1:], torch.zeros(2, 6, 4))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_guarantee_an_inner_product_that_overflows_is_no_short_norm(bad, monkeypatch):
    monkeypatch.setattr(Rows, "inner", lambda self, direction: torch.full((1,), bad))
    grads = Rows(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, 4), 1)
    assert not torch.isfinite(Shifted(grads, torch.ones(1, 4)).sq_norm()).any()


def test_guarantee_squares_that_overflow_are_no_norm():
    wide = Rows(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1, 4), 9e18), 1)
    assert torch.isfinite(wide.sq_norm()).all()
    assert not torch.isfinite(Shifted(wide, torch.full((1, 4), -9e18)).sq_norm()).any()


def test_parts_of_a_convolution_shift_alike():
    values, grad = torch.randn(3, 4, 9, dtype=torch.float64), torch.randn(3, 6, 8, dtype=torch.float64)
    grads = Convolved(values, grad, torch.Size((6, 4, 2)), Geometry((2,), (1,), (0,), (1,), 1))
    moved = Shifted(grads, torch.randn(3, 6, 4, 2, dtype=torch.float64))
    for examples in (slice(0, 0), slice(1, 3)):
        torch.testing.assert_close(moved.part(examples).dense(), moved.dense()[examples])
        torch.testing.assert_close(moved.part(examples).sq_norm(), moved.sq_norm()[examples])
    torch.testing.assert_close(moved.sq_norm(), moved.dense().flatten(1).square().sum(1))


def test_formed_gradients_are_subtracted_from_exactly():
    values = torch.randn(3, 50)
    for centre in (values[1] * (1 + 1e-6), values * (1 + 1e-6)):
        found = shifted(Dense(values), centre)
        assert isinstance(found, Dense)
        true = (values.double() - centre.double()).norm(dim=1)
        torch.testing.assert_close(found.sq_norm().sqrt().double(), true, rtol=1e-5, atol=0)
    grads = _outer((6, 4), 2, 0.0)
    assert isinstance(shifted(grads, torch.randn(6, 4)), Shifted)


def test_a_shift_of_a_shift_is_a_shift_by_both():
    grads, (one, two) = _outer((6, 4), 2, 0.0), torch.randn(2, 6, 4)
    twice, once = Shifted(Shifted(grads, one), two), Shifted(grads, one + two)
    torch.testing.assert_close(twice.sq_norm(), once.sq_norm(), rtol=1e-3, atol=0)
    torch.testing.assert_close(twice.dense(), once.dense())


def test_the_shared_gram_is_used():
    grads = _outer((60, 40), 4, 0.0)
    space, moved = Workspace(), Shifted(grads, torch.randn(60, 40))
    torch.testing.assert_close(moved.sq_norm(space), moved.sq_norm())
    assert space._values is grads.right
    into = torch.zeros(60, 40)
    assert moved.weighted_sum(torch.ones(1), into, space) is into
    torch.testing.assert_close(into, moved.weighted_sum(torch.ones(1)))


@pytest.mark.parametrize("shape", [(4, 6), (6,), (2, 6, 4), (1, 1, 6, 4)])
def test_a_centre_of_another_shape_is_refused(shape):
    with pytest.raises(
        ValueError,
        match=r"a centre of shape \(6, 4\), or one for each of 1 examples; got .*; keep one centre per",
    ):
        Shifted(_outer((6, 4), 2, 0.0), torch.zeros(shape))
