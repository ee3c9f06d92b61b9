# SPDX-License-Identifier: Apache-2.0
"""Attacks that once moved a clipped sum by more than its sensitivity, or passed the probe; each stays refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from clipping import (
    AutomaticClipper,
    Contribution,
    Convolved,
    Dense,
    FlatClipper,
    GroupClipper,
    MixesExamples,
    Outer,
    Routed,
    Rows,
    Sum,
    UnrecordedParameter,
)
from clipping.gradients.convolved import Geometry
from clipping.gradients.path_costs import DEFAULT
from clipping.rounding.products import RUN, product, product_epsilons
from clipping.step.step_sum import StepSum


def step_of(model, clipper, num_examples, **options):
    step = StepSum(model, Contribution(clipper), mean=False, costs=DEFAULT, **options)
    step.tape.attach()
    model.register_forward_pre_hook(step.probing.watch_inputs, with_kwargs=True)
    step.begin(num_examples)
    return step


def total_of(step):
    values = torch.cat([x.double().flatten() for x in step.clipped().total.values()])
    step.end()
    step.tape.detach()
    return values


class Attending(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key = (nn.Parameter(torch.randn(width, width).double() / 2) for _ in range(2))

    def forward(self, x, context):
        return x + torch.softmax((x @ self.query) @ (context @ self.key).mT, -1) @ context


class OwnAndSharedMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attending(4)
        self.register_buffer("memory", torch.randn(1, 3, 4).double())

    def forward(self, x, context):
        return self.attention(self.attention(x, self.memory), context).sum((1, 2))


def test_a_proof_for_one_call_does_not_serve_a_call_of_another_structure():
    torch.manual_seed(0)
    model, (x, context) = OwnAndSharedMemory(), torch.randn(2, 16, 3, 4).double()
    context[0] *= 100

    def clipped(rows, clip_norm):
        step = step_of(model, FlatClipper(clip_norm), len(rows))
        step.add(model(x[rows], context[rows]))
        return total_of(step)

    everybody, others = clipped(range(16), 1.0), clipped(range(1, 16), 1.0)
    assert float((everybody - others).norm()) <= 1 + 1e-9
    expected = torch.autograd.grad(model(x, context).sum(), list(model.parameters()))
    torch.testing.assert_close(clipped(range(16), 1e9), torch.cat([g.flatten() for g in expected]))


@pytest.mark.parametrize(
    "module", [nn.Conv2d(4, 4, 3), nn.Conv2d(16, 4, 3), nn.Linear(8, 8), nn.LayerNorm(8)]
)
def test_a_backward_inside_autocast_sums_in_float32(module):
    shape = (7, module.in_channels, 8, 8) if isinstance(module, nn.Conv2d) else (7, 70, 8)
    model, x = nn.Sequential(module), torch.ones(shape)
    step = step_of(model, FlatClipper(1.0), 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for row in range(7):
            step.add(model(x[row : row + 1]).float().flatten(1).sum(1))
    assert {value.dtype for value in step.sums.totals.values()} == {torch.float32}
    assert float(total_of(step).norm()) == pytest.approx(7, rel=1e-5)


class Boom(torch.autograd.Function):
    fails = True

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if Boom.fails:
            raise KeyError("boom")
        return grad


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return Boom.apply(self.first(x)).sum((1, 2)) + self.second(x).sum((1, 2))


def test_a_gram_does_not_outlive_a_failed_backward():
    model, buffer = Branches(), np.zeros((1, 8, 64), np.float32)
    step, Boom.fails = step_of(model, FlatClipper(1.0), 1), True
    buffer[:] = 1e-3 * np.random.default_rng(0).normal(size=buffer.shape)
    with pytest.raises(KeyError):
        step.add(model(torch.from_numpy(buffer)))
    step.discard()
    buffer[:], Boom.fails = 1e3 * np.random.default_rng(1).normal(size=buffer.shape), False
    step.add(model(torch.from_numpy(buffer)))
    assert float(total_of(step).norm()) <= 1 + 1e-5


@pytest.mark.parametrize("clipper", [FlatClipper(0.002), AutomaticClipper(1.0, gamma=1e-4)])
def test_an_underflow_in_one_group_of_channels_is_not_hidden_by_another(clipper):
    model = nn.Conv1d(2, 1024, 1, groups=2, bias=False)
    x = torch.tensor([[[1.8e19], [1e-3]]])
    grad = torch.cat([torch.full((512, 1), 2.6e-23), torch.full((512, 1), 1e-3)])[None]
    step = step_of(model, clipper, 1)
    step.add((model(x) * grad).flatten(1).sum(1))
    assert float(total_of(step).norm()) <= clipper.sensitivity * (1 + 1e-5)


@pytest.mark.parametrize("size", [1 << 18, (1 << 20) + 3, 1 << 24])
def test_the_norm_of_a_long_row_is_not_too_short(size):
    values = torch.full((1, size), 1.25)
    assert float(Dense(values).sq_norm().sqrt()) == pytest.approx(1.25 * size**0.5, rel=1e-6)


class Contrast(nn.Module):
    """Each example is compared with the mean of the batch; the first and last weigh nothing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("silent", [(0, 5), (0, 1, 5), (0, 3, 4, 5)])
def test_the_probe_looks_for_examples_that_say_something(silent):
    model, weights = Contrast(), torch.ones(6)
    weights[list(silent)] = 0
    step = step_of(model, FlatClipper(1.0), 6)
    out = model(torch.randn(6, 3))
    losses = ((out - out.mean(0)) ** 2).sum(1) * weights
    refused = len(silent) < 4
    try:
        step.add(losses)
    except MixesExamples:
        refused = True
        assert step.probing.done is False
    else:
        assert not refused or not step.probing.done  # nothing was seen: it tries again
    assert not step.probing.done


class LateMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        hidden = self.inner(x)
        return x + self.out(torch.softmax(hidden @ hidden.T, -1) @ hidden)


def test_a_branch_that_starts_at_zero_is_probed_again_once_it_moved():
    model = LateMixer()
    step = step_of(model, FlatClipper(1.0), 6)
    with pytest.raises(MixesExamples):
        for _ in range(2):
            step.add(model(torch.randn(6, 3)).square().sum(1))
            step.end()
            with torch.no_grad():
                model.out.weight.add_(torch.eye(3))
            step.begin(6)


def test_guarantee_another_second_backward_is_refused():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(8, 8, bias=False), nn.Dropout(0.5), nn.Linear(8, 8, bias=False)
            )

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False, preserve_rng_state=False)

    torch.manual_seed(0)
    model = Dropping()
    step = step_of(model, FlatClipper(1e-2), 4, two_pass=True)
    step.probing.done = step.probing.losses_done = True
    with pytest.raises(RuntimeError, match="both backwards to deliver the same gradient"):
        step.add(model(torch.randn(4, 8)).square().sum(1))


def test_other_tensors_in_place_of_the_parameters_are_refused():
    model = nn.Sequential(nn.Linear(3, 2))
    step = step_of(model, FlatClipper(1.0), 4)
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    with pytest.raises(UnrecordedParameter, match="functional_call"):
        torch.func.functional_call(model, doubled, (torch.randn(4, 3),))
    same = dict(model.named_parameters())
    step.add(torch.func.functional_call(model, same, (torch.randn(4, 3),)).sum(1))
    assert step.num_added == 4


def test_no_positions_are_no_gradient_and_a_tiny_clip_norm_is_some_sensitivity():
    empty = Outer(torch.zeros(2, 1, 0, 3), torch.zeros(2, 1, 0, 4), torch.Size((3, 4)))
    assert empty.sq_norm().tolist() == [0, 0]
    assert GroupClipper((("a",),), (FlatClipper(1e-170),)).sensitivity == pytest.approx(1e-170)


def test_an_example_whose_square_overflows_is_not_taken_for_mixing():
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    x[2] = 1e10
    step = step_of(model, FlatClipper(1.0), 6)
    step.add(model(x).square().sum(1))
    assert step.num_added == 6


# -- numbers chosen to vanish beside others in float32 ---------------------------------------------------------


def held(grads, exact, clip_norm=1.0):
    """Neither the true gradient nor what enters the sum, clipped by the norm, is longer than `clip_norm`."""
    norm = grads.sq_norm().sqrt()
    weights = FlatClipper(clip_norm).weights(norm)
    true = exact.double().flatten(1).norm(dim=1)
    assert (norm.double() >= true * (1 - 1e-5)).all(), (true / norm.double()).tolist()
    assert (weights * true).max() <= clip_norm * (1 + 1e-5)
    for row in range(len(norm)):
        alone = torch.where(torch.arange(len(norm)) == row, weights, 0)
        assert grads.weighted_sum(alone).double().norm() <= clip_norm * (1 + 1e-5)


def vanishing(width, positions, ones=16, tail=2.4e-4, apart=False):
    """(1, 1, T, width): the ones of half of the positions cancel those of the others, and tails are left."""
    y = torch.full((width,), tail)
    y[torch.arange(ones) * (width // ones if apart else 1)] = 1
    z = torch.where(y == 1, -y, 0)
    return torch.stack([y] * (positions // 2) + [z] * (positions // 2))[None, None]


def formed(left, right):
    return left.double().mT @ right.double()


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("ones", [(16, False), (4, True), (32, True)])
@pytest.mark.parametrize("positions", [2, 16, 64])
@pytest.mark.parametrize("width", [768, 4096, 50257])
def test_guarantee_tails_that_vanish_beside_ones_are_measured(width, positions, ones, swapped):
    left = vanishing(width, positions, ones[0], apart=ones[1])
    right = torch.ones(1, 1, positions, 72)
    exact = formed(left, right)
    if swapped:
        left, right, exact = right, left, exact.mT
    grads = Outer(left, right, exact.shape[2:])
    assert positions * sum(grads.shape) <= grads.shape.numel()  # the path through the Gram matrices
    held(grads, exact)
    both = [x[:, 0] for x in (left, right)]
    experts = torch.zeros(1, positions, dtype=torch.long)
    held(Routed(experts, *both, 1), exact)


@pytest.mark.parametrize("tail", [1e-4, 2.4e-4])
@pytest.mark.parametrize("positions", [300, 4096, 50176])
def test_guarantee_positions_that_vanish_beside_ones_are_measured(positions, tail):
    left, right = torch.full((2, 1, 1, positions, 16), tail)
    left[:, :, 0], left[:, :, -1], right[:, :, 0], right[:, :, -1] = 1, -1, 1, 1
    exact = formed(left, right)[:, 0]
    held(Outer(left, right, torch.Size((16, 16))), exact)
    sides = [x[:, 0].mT.contiguous() for x in (right, left)]
    convolved = Convolved(*sides, torch.Size((16, 16, 1)), Geometry((1,), (1,), (0,), (1,), 1))
    held(convolved, exact)


@pytest.mark.parametrize("geometry", [(1, 0, 1), (2, 1, 1), (1, 2, 2), (3, 2, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_in_slices_is_the_whole(geometry, groups):
    stride, padding, dilation = geometry
    values = torch.randn(2, 32 * groups, 99, 83, dtype=torch.float64)
    layer = nn.Conv2d(32 * groups, 4, 3, stride, padding, dilation, groups, bias=False).double()
    out = layer(values)
    grad = torch.randn_like(out)
    shape = layer.weight.shape
    sizes = Geometry((3, 3), (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups)
    grads = Convolved(values, grad, shape, sizes)
    (expected,) = torch.autograd.grad(out, layer.weight, grad)
    torch.testing.assert_close(grads.weighted_sum(torch.ones(2).double()), expected)
    torch.testing.assert_close(grads.dense(), grads.outer().dense())


@pytest.mark.parametrize("positions", [1024, 50176])
def test_guarantee_values_that_vanish_in_a_row_are_measured(positions):
    ones = positions // 8
    values = torch.full((1, positions, 4), 2.9e-8 * ones)
    values[:, :ones], values[:, -ones:] = 1, -1
    for kept in (1.0, 0.7):  # the ones cancel, or leave some
        values[:, -ones:] = -kept
        grads = Rows(torch.zeros(1, positions, dtype=torch.long), values, 2)
        held(grads, values.double().sum(1, keepdim=True))


@pytest.mark.parametrize("positions", [2, 16])
@pytest.mark.parametrize("width", [768, 4096])
@pytest.mark.parametrize("tail", [1e-4, 2.4e-4, 1e-3])
def test_guarantee_a_tied_sum_that_cancels_is_measured(width, positions, tail):
    right = vanishing(width, positions, tail=tail).abs()
    left = torch.zeros(1, 1, positions, 2)
    left[..., 0] = 1
    for cut in (True, False):
        sums = right.double().sum(2)
        values = -torch.where(right == tail, 0, right)[:, 0] if cut else -sums.float()
        head = Outer(left, right, torch.Size((2, width)))
        table = Rows(torch.zeros(1, values.shape[1], dtype=torch.long), values, 2)
        exact = formed(left, right)[:, 0]
        exact[:, 0] += values.double().sum(1)
        for parts in ((head, table), (table, head)):
            held(Sum(parts), exact)
        loose = Routed(torch.zeros(1, positions, dtype=torch.long), left[:, 0], right[:, 0], 1)
        other = Outer(-left, torch.where(right == tail, 0, right), torch.Size((1, 2, width)))
        held(Sum((loose, other)), loose_exact(loose, other))


def loose_exact(loose, other):
    return formed(loose.left, loose.right) + formed(other.left, other.right)[:, 0]


@settings(max_examples=150, deadline=None)
@given(
    width=st.sampled_from([40, 300, 768, 5000]),
    positions=st.sampled_from([2, 6, 32]),
    ones=st.sampled_from([1, 3, 16, 64]),
    tail=st.floats(-13.5, -3).map(lambda power: 2.0**power),
    left_over=st.sampled_from([0.0, 1e-6, 1e-4, 1e-2, 0.3]),
    first=st.booleans(),
    swapped=st.booleans(),
    spread=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_guarantee_no_example_found_is_longer_than_its_norm(
    width, positions, ones, tail, left_over, first, swapped, spread, seed
):
    # Ones that cancel but for a part, before or behind the tails, seen by inputs that are nearly alike.
    torch.manual_seed(seed)
    left = vanishing(width, positions, min(ones, width - 1), tail)
    left[:, :, positions // 2 :] *= 1 - left_over
    left = left if first else left.flip(3)
    right = 1 + spread * torch.randn(1, 1, positions, 48)
    pair = (right, left) if swapped else (left, right)
    exact = formed(*pair)
    grads = Outer(*pair, exact.shape[2:])
    held(grads, exact)
    for measured in (grads._ghost_norms(None).squares, grads.formed_norms().squares):
        assert measured.sqrt().double().item() >= float(exact.norm()) * (1 - 1e-5)


@pytest.mark.parametrize("length", [1, 5, RUN, RUN + 1, 4096, 50257])
@pytest.mark.parametrize("fill", [1.1, 1 / 3, "spikes"])
def test_guarantee_a_product_errs_by_less_than_its_bound(length, fill):
    row = torch.full((1, length), 2.4e-4 if fill == "spikes" else fill)
    row[:, ::500] = 1.0
    found, exact = product(row, row.T).double(), row.double() @ row.double().T
    assert abs(found / exact - 1).item() <= product_epsilons(length) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("width", [768, 4096])
@pytest.mark.parametrize("positions", [2, 16])
def test_an_example_whose_positions_cancel_adds_no_more_than_the_clip_norm(width, positions):
    model = nn.Sequential(nn.Linear(72, width, bias=False))
    x = torch.ones(2, positions, 72)
    grad = vanishing(width, positions)[:, 0]
    step = step_of(model, FlatClipper(1e-3), 2)
    step.add((model(x) * torch.cat([grad, torch.zeros_like(grad)])).sum((1, 2)))
    entered = total_of(step)
    assert 0 < float(entered.norm()) <= 1e-3 * (1 + 1e-5)
    # The true gradient, scaled by the weight that the example was given, is within the bound as well.
    norm = Outer(grad[None], x[:1][None], torch.Size((width, 72))).sq_norm().sqrt().double()
    assert formed(grad[None], x[:1][None]).norm() * 1e-3 / norm <= 1e-3 * (1 + 1e-5)
