# SPDX-License-Identifier: Apache-2.0
"""The law of `clipping.gradients.sample_grads`: every structure means its `dense()` tensor, and every method agrees with it."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from clipping import Dense, Outer, Routed, Rows, SampleGrads, Sum, add, cross
from clipping.collectors.one_pass import settled
from clipping.gradients.clamped import Clamped
from clipping.gradients.path_costs import Costs
from clipping.gradients.points import Points
from clipping.gradients.shifted import Shifted
from clipping.rounding.norms import CHUNK_ELEMENTS

F64 = torch.float64
V, D = 6, 4


def dense(num_examples, shape=(V, D), dtype=F64):
    return Dense(torch.randn(num_examples, *shape, dtype=F64).to(dtype))


def outer(num_examples, shape=(V, D), positions=3, groups=1, dtype=F64):
    num_out, num_in = shape[0] // groups, shape[1]
    left = torch.randn(num_examples, groups, positions, num_out, dtype=F64).to(dtype)
    right = torch.randn(num_examples, groups, positions, num_in, dtype=F64).to(dtype)
    return Outer(left, right, torch.Size(shape))


def rows(num_examples, shape=(V, D), positions=5, dtype=F64):
    indices = torch.randint(0, shape[0], (num_examples, positions))
    return Rows(indices, torch.randn(num_examples, positions, shape[1], dtype=F64).to(dtype), shape[0])


def routed(num_examples, experts=3, slots=5, dtype=F64, shape=(V, D)):
    index = torch.randint(0, experts, (num_examples, slots))
    left, right = (torch.randn(num_examples, slots, size, dtype=F64).to(dtype) for size in shape)
    return Routed(index, left, right, experts)


def points(num_examples, shape=(V, D), dtype=F64):
    rows = torch.arange(num_examples).repeat(2)
    first = torch.randint(0, shape[0] * shape[1] // 2, (num_examples,))
    places = torch.cat((first, first + shape[0] * shape[1] // 2))
    values = torch.randn(2 * num_examples, dtype=F64).to(dtype)
    return Points(rows, places, values, num_examples, torch.Size(shape))


def total(*makers):
    def make(num_examples, dtype=F64):
        made = [maker(num_examples, dtype=dtype) for maker in makers]
        result = made[0]
        for other in made[1:]:
            result = add(result, other)
        return result

    return make


# A new structure is one line here.
PLAIN: dict[str, Callable[..., SampleGrads]] = {
    "dense": dense,
    "dense of a vector": lambda n, dtype=F64: dense(n, (5,), dtype),
    "dense of a scalar": lambda n, dtype=F64: dense(n, (), dtype),
    "outer, one position": lambda n, dtype=F64: outer(n, positions=1, dtype=dtype),
    "outer, formed norm": lambda n, dtype=F64: outer(n, positions=40, dtype=dtype),
    "outer, ghost norm": lambda n, dtype=F64: outer(n, (30, 20), positions=4, dtype=dtype),
    "outer, groups": lambda n, dtype=F64: outer(n, positions=7, groups=3, dtype=dtype),
    "outer, groups and one position": lambda n, dtype=F64: outer(n, positions=1, groups=2, dtype=dtype),
    "outer, groups and ghost norm": lambda n, dtype=F64: outer(
        n, (60, 20), positions=4, groups=3, dtype=dtype
    ),
    "rows": rows,
    "rows, one position": lambda n, dtype=F64: rows(n, positions=1, dtype=dtype),
    "rows, few and repeated": lambda n, dtype=F64: rows(n, (2, D), positions=30, dtype=dtype),
    "points": points,
    "points + rows": total(points, rows),
    "dense + points": total(dense, points),
    "routed": routed,
    "routed, one slot": lambda n, dtype=F64: routed(n, slots=1, dtype=dtype),
    "routed, one expert": lambda n, dtype=F64: routed(n, 1, 30, dtype),
    "routed + routed": total(routed, routed),
    "dense + routed": lambda n, dtype=F64: add(dense(n, (3, V, D), dtype), routed(n, dtype=dtype)),
    "dense + dense": total(dense, dense),
    "dense + outer": total(dense, outer),
    "outer + dense": total(outer, dense),
    "dense + rows": total(dense, rows),
    "rows + outer": total(rows, outer),
    "outer + rows": total(outer, rows),
    "outer + outer": total(outer, outer),
    "rows + rows": total(rows, rows),
    "outer + rows + dense": total(outer, rows, dense),
    "rows + outer + outer": total(rows, outer, outer),
    "rows + dense + rows": total(rows, dense, rows),
    "dense + outer of groups": lambda n, dtype=F64: add(
        dense(n, dtype=dtype), outer(n, groups=3, dtype=dtype)
    ),
    "outer of groups + rows": lambda n, dtype=F64: Sum(
        (Outer(*_wide(n, dtype), torch.Size((V, D))), rows(n, dtype=dtype))
    ),
    "sum of sums": lambda n, dtype=F64: add(
        total(outer, rows)(n, dtype=dtype), total(rows, dense)(n, dtype=dtype)
    ),
}


def shifted_by_one(make):
    def made(num_examples, dtype=F64):
        grads = make(num_examples, dtype=dtype)
        return Shifted(grads, torch.randn(grads.shape, dtype=F64))

    return made


def shifted_by_each(make):
    def made(num_examples, dtype=F64):
        grads = make(num_examples, dtype=dtype)
        return Shifted(grads, torch.randn(num_examples, *grads.shape, dtype=F64))

    return made


def shifted_in_part(make):
    def made(num_examples, dtype=F64):
        return shifted_by_one(make)(num_examples, dtype).masked(torch.arange(num_examples) != 1)

    return made


def clamped(make):
    return lambda num_examples, dtype=F64: Clamped(make(num_examples, dtype=dtype), 0.75)


STRUCTURES: dict[str, Callable[..., SampleGrads]] = (
    PLAIN
    | {f"{name}, shifted": shifted_by_one(make) for name, make in PLAIN.items()}
    | {
        f"{name}, each shifted": shifted_by_each(PLAIN[name])
        for name in ("dense of a scalar", "outer, ghost norm", "rows")
    }
    | {f"{name}, shifted in part": shifted_in_part(PLAIN[name]) for name in ("dense", "routed")}
    | {f"{name}, clamped": clamped(make) for name, make in PLAIN.items()}
    | {"outer, shifted, clamped": clamped(shifted_by_one(outer))}
    | {"outer, shifted + rows": total(shifted_by_one(outer), rows)}
    | {"rows + outer, clamped": total(rows, clamped(outer))}
)


def _wide(num_examples, dtype):
    made = outer(num_examples, positions=2, dtype=dtype)
    return made.left, made.right


def close(got, expected, rtol=1e-9):
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("num_examples", [0, 1, 3])
class TestConformance:
    """What any `SampleGrads` must satisfy, against the tensor it means."""

    @pytest.fixture
    def grads(self, name, num_examples):
        return STRUCTURES[name](num_examples)

    def test_shape(self, grads, num_examples):
        assert isinstance(grads, SampleGrads)
        assert grads.num_examples == num_examples
        assert grads.dense().shape == (num_examples, *grads.shape)

    def test_sq_norm(self, grads, num_examples):
        expected = grads.dense().reshape(num_examples, grads.shape.numel()).square().sum(1)
        close(grads.sq_norm(), expected)
        assert grads.sq_norm().shape == (num_examples,)

    def test_inner_with_one_direction(self, grads, num_examples):
        direction = torch.randn(grads.shape, dtype=F64)
        expected = (grads.dense() * direction).reshape(num_examples, grads.shape.numel()).sum(1)
        close(grads.inner(direction), expected)

    def test_inner_with_a_direction_per_example(self, grads, num_examples):
        direction = torch.randn(num_examples, *grads.shape, dtype=F64)
        expected = (grads.dense() * direction).reshape(num_examples, grads.shape.numel()).sum(1)
        close(grads.inner(direction), expected)

    def test_weighted_sum(self, grads, num_examples):
        for scale in (1.0, 17.0):
            weights = torch.rand(num_examples, dtype=F64) * scale
            expected = torch.einsum("b,b...->...", weights, grads.dense())
            close(grads.weighted_sum(weights), expected)
            assert grads.weighted_sum(weights).shape == grads.shape

    def test_weighted_sum_adds_into_a_total(self, grads, num_examples):
        weights = torch.rand(num_examples, dtype=F64)
        into = torch.randn(grads.shape, dtype=F64)
        expected = into + torch.einsum("b,b...->...", weights, grads.dense())
        got = grads.weighted_sum(weights, into)
        close(got, expected)
        assert got.data_ptr() == into.data_ptr()

    def test_weighted_sum_adds_into_a_strided_total(self, grads, num_examples):
        weights = torch.rand(num_examples, dtype=F64)
        into = torch.randn(grads.shape[::-1], dtype=F64).permute(tuple(reversed(range(len(grads.shape)))))
        expected = into + torch.einsum("b,b...->...", weights, grads.dense())
        close(grads.weighted_sum(weights, into), expected)

    def test_masked(self, grads, num_examples):
        keep = torch.arange(num_examples) % 2 == 0
        expected = grads.dense() * keep.view(-1, *[1] * len(grads.shape))
        close(grads.masked(keep).dense(), expected)
        assert type(grads.masked(keep)) is type(grads)

    def test_masking_removes_non_finite_examples(self, name, num_examples):
        for bad in (float("nan"), float("inf"), -float("inf")):
            grads = _poisoned(STRUCTURES[name](num_examples), bad)
            keep = torch.arange(num_examples) != 0
            assert not torch.isfinite(grads.sq_norm()[~keep]).any()
            assert torch.isfinite(grads.sq_norm()[keep]).all()
            summed = grads.masked(keep).weighted_sum(keep.to(F64))
            assert torch.isfinite(summed).all()

    def test_part(self, grads, num_examples):
        for some in (slice(0, 0), slice(0, 1), slice(1, 3), slice(None)):
            part = grads.part(some)
            assert type(part) is type(grads) and part.shape == grads.shape
            close(part.dense(), grads.dense()[some])
            close(part.sq_norm(), grads.sq_norm()[some])

    def test_rounding_bounds_the_error_of_an_inner_product(self, name, num_examples):
        grads = STRUCTURES[name](num_examples, dtype=torch.float32)
        rounding = grads.rounding()
        assert rounding.shape == (num_examples,) and rounding.dtype == torch.float32
        direction = torch.randn(grads.shape)
        error = grads.inner(direction).double() - _as_double(grads).inner(direction.double())
        assert (error.abs() <= rounding * direction.norm()).all()
        norm = torch.linalg.vector_norm(
            _as_double(grads).dense().reshape(num_examples, grads.shape.numel()), dim=1
        )
        assert (
            rounding >= 8 * torch.finfo(torch.float32).eps * norm
        ).all()  # errors grow with terms, not sums

    def test_settled_means_the_same(self, grads, num_examples):
        for costs in (Costs(traffic=1e-3, keep_memory=1e9), Costs(keep_memory=0)):
            found, choice = settled(grads, costs)
            close(found.dense(), grads.dense())
            close(found.sq_norm(), grads.sq_norm())
            assert choice.path and choice.why

    def test_bfloat16_is_summed_in_float32(self, name, num_examples):
        grads = STRUCTURES[name](num_examples, dtype=torch.bfloat16)
        weights = torch.rand(num_examples)
        for got in (grads.sq_norm(), grads.weighted_sum(weights), grads.inner(torch.ones(grads.shape))):
            assert got.dtype == torch.float32
        exact = _as_double(grads).dense()
        flat = exact.reshape(num_examples, grads.shape.numel())
        # Rounded up by what float32 may err at worst, never down.
        close(grads.sq_norm(), flat.square().sum(1), rtol=5e-4)
        close(grads.weighted_sum(weights), torch.einsum("b,b...->...", weights.double(), exact), rtol=1e-4)


def _mapped(grads, change):
    match grads:
        case Dense():
            return Dense(change(grads.values))
        case Outer():
            return Outer(change(grads.left), grads.right.double(), grads.shape)
        case Routed():
            return Routed(grads.experts, change(grads.left), grads.right.double(), grads.num_experts)
        case Rows():
            return Rows(grads.indices, change(grads.values), grads.num_rows)
        case Sum():
            return Sum(tuple(_mapped(part, change) for part in grads.parts))
        case Shifted():
            return Shifted(_mapped(grads.grads, change), grads.centre.double(), grads.present)
        case Points():
            return dataclasses.replace(grads, values=change(grads.values))
        case Clamped():
            return Clamped(_mapped(grads.grads, change), grads.bound)


def _as_double(grads):
    return _mapped(grads, lambda x: x.double())


def _poisoned(grads, bad):
    def change(values):
        values = values.clone()
        values[:1] = bad
        return values

    return _mapped(grads, change)


KINDS = {
    "dense": dense,
    "outer": outer,
    "outer, formed": lambda n: outer(n, positions=30),
    "rows": rows,
    "rows, one": lambda n: rows(n, positions=1),
}


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("num_examples", [0, 3])
def test_cross_and_add_agree_with_dense(first, second, num_examples):
    a, b = KINDS[first](num_examples), KINDS[second](num_examples)
    close(cross(a, b), (a.dense() * b.dense()).flatten(1).sum(1))
    close(add(a, b).dense(), a.dense() + b.dense())
    close(add(a, b).sq_norm(), (a.dense() + b.dense()).flatten(1).square().sum(1))


@pytest.mark.parametrize(
    "parts", [("dense", "rows", "outer"), ("rows", "outer", "rows"), ("outer", "outer", "dense")]
)
def test_add_does_not_depend_on_the_order(parts):
    made = [KINDS[part](2) for part in parts]
    left = add(add(made[0], made[1]), made[2])
    right = add(made[0], add(made[1], made[2]))
    close(left.sq_norm(), right.sq_norm())
    close(left.dense(), right.dense())
    kinds = [type(part) for part in left.parts]
    assert len(kinds) == len(set(kinds))


def test_cross_in_chunks_is_the_same(monkeypatch):
    made = outer(5, positions=9), rows(5, positions=4)
    expected = cross(*made), made[0].sq_norm(), outer(0).sq_norm().shape
    monkeypatch.setattr("clipping.rounding.norms.CHUNK_ELEMENTS", 40)
    close(cross(*made), expected[0])
    close(made[0].sq_norm(), expected[1])
    for direction in (torch.randn(V, D, dtype=F64), torch.randn(5, V, D, dtype=F64)):
        close(made[0].inner(direction), (made[0].dense() * direction).flatten(1).sum(1))


def test_add_refuses_other_batches_and_shapes():
    with pytest.raises(ValueError, match=r"for the same examples; got 2 examples of \(6, 4\) and 3 of"):
        add(dense(2), dense(3))
    with pytest.raises(
        ValueError, match="use every shared layer with the whole batch in its first dimension"
    ):
        add(dense(2), dense(2, (4, 6)))


def test_complex_gradients_are_refused():
    with pytest.raises(
        TypeError, match=r"gradients of real numbers; got torch.complex64; hold .*view_as_real"
    ):
        Dense(torch.randn(2, 3, dtype=torch.complex64)).sq_norm()


# -- float32: the norm must bound what enters the sum, also where the terms of an example cancel --------------


def _cancelling(positions, num_out, num_in, size, spread, groups=1):
    signs = torch.tensor([1.0, -1.0] * (positions // 2)).view(1, 1, -1, 1)
    left = size * signs * torch.randn(1, groups, 1, num_out)
    right = torch.randn(1, groups, 1, num_in) * (1 + spread * torch.randn(1, groups, positions, 1))
    return Outer(left, right, torch.Size((groups * num_out, num_in)))


def _bounded(grads, clip_norm=1.0, dtype=torch.float64):
    norm = grads.sq_norm().sqrt()
    weights = clip_norm / norm.clamp_min(clip_norm)
    weights = torch.where(torch.isfinite(norm), weights, 0)
    moved = grads.masked(torch.isfinite(norm)).weighted_sum(weights).to(dtype).norm().item()
    assert moved <= clip_norm * (1 + 1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    positions=st.sampled_from([2, 4, 16, 64]),
    width=st.sampled_from([(4, 4), (32, 32), (128, 96), (3, 200)]),
    groups=st.sampled_from([1, 2]),
    size=st.sampled_from([1.0, 1e3, 1e6, 1e12, 1e18]),
    spread=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 1e-1]),
    kind=st.sampled_from(["outer", "rows", "sum"]),
)
def test_guarantee_norms_bound_gradients_that_cancel(seed, positions, width, groups, size, spread, kind):
    torch.manual_seed(seed)
    grads = _cancelling(positions, *width, size, spread, groups)
    if kind != "outer":
        indices = torch.randint(0, 2, (1, positions)).repeat_interleave(2, 1)
        signs = torch.tensor([1.0, -1.0]).repeat(positions).view(1, -1, 1)
        values = size * torch.randn(1, 1, width[1]) * signs * (1 + spread * torch.randn(1, 2 * positions, 1))
        table = Rows(indices, values, groups * width[0])
        grads = table if kind == "rows" or groups > 1 else add(grads, table)
    _bounded(grads)


def test_guarantee_ghost_norm_is_not_lost_to_rounding():
    # Before the norm was rounded up, gradients of norm 369 could have a norm of 0.0.
    grads = _cancelling(8, 64, 64, 1e4, 1e-3)
    exact = _as_double(grads).dense().norm()
    assert exact > 10
    assert grads.sq_norm().sqrt() >= exact * (1 - 1e-5)


@pytest.mark.parametrize("positions", [1, 2, 40])
@pytest.mark.parametrize("exponents", [(-18, 18), (-24, 18), (-22, 17.5), (-10, 10), (-30, 5), (-20, 20)])
@pytest.mark.parametrize("swapped", [False, True])
def test_guarantee_norm_survives_tiny_times_huge(positions, exponents, swapped):
    left, right = (torch.full((1, 1, positions, 8), 10.0**e) for e in exponents)
    left, right = (right, left) if swapped else (left, right)
    grads = Outer(left, right, torch.Size((8, 8)))
    exact = _as_double(grads).dense().norm()
    norm = grads.sq_norm().sqrt()
    assert norm >= exact * (1 - 1e-4) or exact < 1e-9 or not torch.isfinite(norm)
    _bounded(grads, clip_norm=1e-6)


@pytest.mark.parametrize("size", [50257, 1 << 20])
def test_guarantee_the_norm_of_one_wide_position_is_not_too_short(size):
    # Added up one after the other, these squares lose up to 1 in 700.
    wide, short = torch.full((1, 1, 1, size), 0.7), torch.ones(1, 1, 1, 2)
    for left, right in ((wide, short), (short, wide)):
        grads = Outer(left, right, torch.Size((left.shape[3], right.shape[3])))
        expected = left.double().square().sum() * right.double().square().sum()
        assert abs(grads.sq_norm().double() / expected - 1) < 1e-5


def test_exact_zero_stays_zero():
    zero = Outer(torch.zeros(2, 1, 3, 30), torch.randn(2, 1, 3, 20), torch.Size((30, 20)))
    table = Rows(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 20), 30)
    for grads in (zero, table, add(zero, table)):
        assert (grads.sq_norm() == 0).all()


@pytest.mark.parametrize("positions", [16, 200])
def test_bfloat16_positions_that_nearly_cancel(positions):
    # A Gram matrix in bfloat16 is off by 10% here; the norm may not be underestimated by more than rounding.
    base_left, base_right = torch.randn(2, 1, 1, 256), torch.randn(2, 1, 1, 256)
    signs = torch.tensor([1.0, -1.0] * (positions // 2)).view(1, 1, -1, 1)
    left = (signs * base_left + 0.05 * torch.randn(2, 1, positions, 256)).bfloat16()
    right = (base_right + 0.05 * torch.randn(2, 1, positions, 256)).bfloat16()
    grads = Outer(left, right, torch.Size((256, 256)))
    exact = torch.linalg.vector_norm(torch.matmul(left.double().mT, right.double()).flatten(1), dim=1)
    ratio = grads.sq_norm().sqrt().double() / exact
    # The price of a bound that holds for every input, where positions cancel to a fiftieth of their terms.
    assert (ratio > 1 - 1e-6).all() and (ratio < 1.1).all()


# -- shapes ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    num_examples=st.integers(0, 4),
    positions=st.integers(1, 12),
    groups=st.integers(1, 3),
    num_out=st.integers(1, 7),
    num_in=st.integers(1, 7),
    table_positions=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_every_shape_agrees_with_dense(
    num_examples, positions, groups, num_out, num_in, table_positions, seed
):
    torch.manual_seed(seed)
    shape = (groups * num_out, num_in)
    first = outer(num_examples, shape, positions, groups)
    second = rows(num_examples, shape, table_positions)
    third = dense(num_examples, shape)
    single = outer(num_examples, shape, positions)
    weights = torch.rand(num_examples, dtype=F64)
    for grads in (first, second, add(single, second), add(add(third, second), single), add(first, third)):
        meant = grads.dense()
        close(grads.sq_norm(), meant.flatten(1).square().sum(1))
        close(grads.weighted_sum(weights), torch.einsum("b,bij->ij", weights, meant))
        close(grads.inner(third.values), (meant * third.values).flatten(1).sum(1))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation made anew (views of what there was do not count)."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def _long(num_examples, positions, num_out, num_in):
    left, right = (
        torch.randn(num_examples, 1, positions, num_out),
        torch.randn(num_examples, 1, positions, num_in),
    )
    return Outer(left, right, torch.Size((num_out, num_in)))


def _tied(positions):
    outer = _long(1, positions, 300, 8)
    return Sum((outer, Rows(torch.randint(0, 300, (1, positions)), torch.randn(1, positions, 8), 300)))


@pytest.mark.parametrize(
    "made",
    [
        lambda: _long(3, 3000, 64, 96),  # Gram matrices of 9 million elements each
        lambda: _long(1, 1500, 2300, 2300),  # a gradient of 5 million elements
        lambda: _tied(3000),
    ],
    ids=["long sequence", "wide layer", "tied, long sequence"],
)
def test_guarantee_no_temporary_of_a_norm_exceeds_the_cap(made):
    grads = made()
    parts = grads.parts if isinstance(grads, Sum) else (grads,)
    held = [x for part in parts for x in (vars_of(part)) if isinstance(x, torch.Tensor)]
    with Largest(*held) as largest:
        grads.sq_norm()
    assert 0 < largest.elements <= max(CHUNK_ELEMENTS, *(x.numel() for x in held))


def vars_of(part):
    return [getattr(part, field.name) for field in dataclasses.fields(part)]
