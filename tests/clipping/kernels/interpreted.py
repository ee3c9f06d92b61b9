# SPDX-License-Identifier: Apache-2.0
"""The kernels on CPU through Triton's interpreter: run by test_kernels.py in a process of its own.

The interpreter is chosen when triton is imported, for the whole process, so nothing else may run beside it.
"""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clipping import kernels
from clipping.kernels import formed, ghost, totals, trust
from clipping.kernels.blocks import EPSILON, Blocks
from dpopt.randomness import philox, philox_kernel

SMALL = Blocks(tile=16, width=16, warps=4, stages=1)
MIDDLE = Blocks(tile=32, width=32, warps=4, stages=1)
# numpy warns of overflow and NaN where a device does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def _bfloat16_products():
    # The interpreter keeps bfloat16 as 16-bit integers and multiplies those; tensor cores do not.
    plain = interpreter.InterpreterBuilder.create_dot

    def decoded(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = decoded(a), decoded(b)
        if a.data.dtype == np.float16:  # exact products, float32 sums
            a, b = (interpreter.TensorHandle(x.data.astype(np.float32), tl.float32) for x in (a, b))
        return plain(self, a, b, d, input_precision, max_num_imprecise_acc)

    interpreter.InterpreterBuilder.create_dot = create_dot
    yield
    interpreter.InterpreterBuilder.create_dot = plain


def pair(num_examples, num_groups, num_positions, num_out, num_in, dtype=torch.float32, layout="plain"):
    made = []
    for width in (num_out, num_in):
        match layout:
            case "plain":
                x = torch.randn(num_examples, num_groups, num_positions, width)
            case "transposed":
                x = torch.randn(num_examples, num_groups, width, num_positions).mT
            case "strided":
                x = torch.randn(num_groups, num_positions + 1, num_examples, 2 * width + 1)
                x = x.permute(2, 0, 1, 3)[:, :, 1:, 1::2]
            case "expanded":
                x = torch.randn(num_examples, 1, 1, width).expand(-1, num_groups, num_positions, -1)
        made.append(x.to(dtype))
    return made


def exact(left, right):
    return left.double().mT @ right.double()


def exact_sq_norm(left, right):
    return exact(left, right).flatten(1).square().sum(1)


def norms(left, right, blocks=SMALL):
    return ghost.ghost_sq_norm(left, right, blocks)[0].double(), formed.formed_sq_norm(
        left, right, blocks
    ).double()


def summed(left, right, weights, blocks=SMALL):
    into = torch.zeros(left.shape[1], left.shape[3], right.shape[3])
    return totals.weighted_sum(left, right, weights, into, blocks)


SHAPES = [(1, 1, 1, 1, 1), (5, 1, 7, 3, 33), (2, 3, 17, 40, 5), (1, 1, 70, 100, 37), (3, 2, 33, 16, 32)]


@pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, "plain") for shape in SHAPES]
    + [(shape, layout) for shape in SHAPES[1:3] for layout in ("transposed", "strided", "expanded")],
)
def test_norms_and_sums_of_odd_shapes(shape, layout):
    left, right = pair(*shape, layout=layout)
    for got in norms(left, right, MIDDLE):
        expected = exact_sq_norm(left, right)
        assert (got >= expected).all()
        torch.testing.assert_close(got, expected, rtol=3e-3, atol=0)
    weights = torch.rand(shape[0])
    expected = torch.einsum("b,bkpd->kpd", weights.double(), exact(left, right))
    torch.testing.assert_close(summed(left, right, weights, MIDDLE).double(), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=12)
@given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)
    ),
    dtype=st.sampled_from(trust.SERVED),
    seed=st.integers(0, 10**6),
)
def test_every_shape_and_dtype(shape, dtype, seed):
    torch.manual_seed(seed)
    left, right = pair(*shape, dtype=dtype)
    weights = torch.rand(shape[0])
    for got in norms(left, right, MIDDLE):
        torch.testing.assert_close(got, exact_sq_norm(left, right), rtol=3e-3, atol=1e-30)
    expected = torch.einsum("b,bkpd->kpd", weights.double(), exact(left, right))
    torch.testing.assert_close(summed(left, right, weights, MIDDLE).double(), expected, rtol=1e-5, atol=1e-4)


def test_default_blocks_and_traces():
    for dtype in (torch.float32, torch.bfloat16):
        left, right = pair(2, 1, 130, 70, 130, dtype)
        got, traces = ghost.ghost_sq_norm(left, right)
        torch.testing.assert_close(got.double(), exact_sq_norm(left, right), rtol=2e-3, atol=0)
        for trace, x in zip(traces, (left, right), strict=True):
            torch.testing.assert_close(trace, x.float().square().sum((1, 2, 3)), rtol=1e-5, atol=0)
        got = formed.formed_sq_norm(left, right)
        torch.testing.assert_close(got.double(), exact_sq_norm(left, right), rtol=2e-3, atol=0)


def test_every_pair_of_tiles_is_visited_once():
    # 300 rows of tiles: the rounded square root must find each of 45150 pairs.
    @triton.jit
    def kernel(out, SIZE: tl.constexpr):
        lanes = tl.arange(0, SIZE)
        row, column = ghost.lower_pair(lanes)
        tl.store(out + lanes, row * 65536 + column)

    size = 1 << 16
    out = torch.zeros(size, dtype=torch.int32)
    kernel[(1,)](out, SIZE=size)
    expected = [row * 65536 + column for row in range(400) for column in range(row + 1)]
    assert out.tolist() == expected[:size]


def test_lower_pair_survives_a_rounded_root():
    for row in (5792, 65534):
        first = row * (row + 1) // 2
        for number in (first - 1, first, first + row):
            root = int((np.sqrt(np.float32(8) * np.float32(number) + np.float32(1)) - 1) * np.float32(0.5))
            true = (math.isqrt(8 * number + 1) - 1) // 2
            assert abs(root - true) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("size", [1.0, 1e9, 1e-9])
def test_guarantee_norms_bound_what_cancelling_positions_add(dtype, spread, size):
    positions = 40
    signs = torch.tensor([1.0, -1.0] * (positions // 2)).view(1, 1, -1, 1)
    left = (size * signs * torch.randn(1, 1, 1, 33)).to(dtype)
    right = (torch.randn(1, 1, 1, 20) * (1 + spread * torch.randn(1, 1, positions, 1))).to(dtype)
    moved = summed(left, right, torch.ones(1)).double().square().sum()
    for got in norms(left, right):
        assert got.item() >= max(moved.item(), exact_sq_norm(left, right).item())
        scale = (left.double().square().sum() * right.double().square().sum()).item()
        assert got.item() <= exact_sq_norm(left, right).item() + 1e-4 * scale


def test_guarantee_the_margin_covers_truncated_sums():
    # What a tensor core may do at worst: every run short by RUN_EPSILONS of its terms.
    left, right = pair(3, 1, 48, 64, 48)
    plain = interpreter.InterpreterBuilder.create_dot

    def short(self, a, b, d, input_precision, max_num_imprecise_acc):
        dot = plain(self, a, b, d, input_precision, max_num_imprecise_acc)
        lost = 48 * np.float32(2.0**-23) * (np.abs(a.data) @ np.abs(b.data))
        return interpreter.TensorHandle((dot.data - np.sign(dot.data) * lost).astype(np.float32), dot.dtype)

    interpreter.InterpreterBuilder.create_dot = short
    try:
        lower = norms(left, right)
    finally:
        interpreter.InterpreterBuilder.create_dot = plain
    for got in lower:
        assert (got >= exact_sq_norm(left, right)).all()


@pytest.mark.parametrize("width", [768, 4000])
@pytest.mark.parametrize("swapped", [False, True])
def test_guarantee_runs_that_vanish_beside_ones_are_measured(width, swapped):
    # A run of tails is less than half an epsilon of the sum before it, which the second position cancels.
    tail = 0.99 * (8 * EPSILON / SMALL.width) ** 0.5
    left = torch.full((1, 1, 2, width), tail)
    left[..., :16] = 1
    left[:, :, 1] = torch.where(left[:, :, 1] == 1, -1.0, 0.0)
    right = torch.ones(1, 1, 2, 8)
    pair = (right, left) if swapped else (left, right)
    for got in norms(*pair):
        assert got.item() >= exact_sq_norm(*pair).item()


def test_guarantee_positions_that_vanish_beside_ones_are_measured():
    positions = 4000
    left = torch.full((1, 1, positions, 2), 0.99 * (EPSILON / 2 / SMALL.width) ** 0.5)
    right = left.clone()
    left[:, :, 0], right[:, :, 0], left[:, :, -1], right[:, :, -1] = 1, 1, -1, 1
    assert formed.formed_sq_norm(left, right, SMALL).item() >= exact_sq_norm(left, right).item()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_an_example_of_weight_zero_never_enters(bad):
    left, right = pair(3, 2, 20, 18, 5)
    left[1] = bad
    right[1, :, 3:] = bad
    for got in norms(left, right):
        assert not torch.isfinite(got[1].float())
        assert torch.isfinite(got[[0, 2]]).all()
    weights = torch.tensor([0.5, 0.0, 2.0])
    others = [0, 2]
    expected = torch.einsum("b,bkpd->kpd", weights[others].double(), exact(left[others], right[others]))
    torch.testing.assert_close(summed(left, right, weights).double(), expected, rtol=1e-5, atol=1e-5)


def test_zero_stays_zero_and_large_squares_do_not_overflow():
    left, right = pair(2, 1, 20, 18, 5)
    left[0] = 0
    left[1] *= 1e12
    for got in norms(left, right):
        assert got[0] == 0
        assert torch.isfinite(got[1])


def test_weighted_sum_in_one_piece_and_in_splits(monkeypatch):
    left, right = pair(5, 1, 18, 20, 9)
    weights = torch.rand(5)
    expected = 1 + torch.einsum("b,bkpd->kpd", weights.double(), exact(left, right))
    for programs in (1, 5, 1000):
        monkeypatch.setattr(totals, "PROGRAMS", programs)
        into = torch.ones(20, 9)
        got = totals.weighted_sum(left, right, weights, into, SMALL)
        assert got is into
        torch.testing.assert_close(into.double(), expected[0], rtol=1e-5, atol=1e-5)


def test_weighted_sum_refuses_other_totals():
    left, right = pair(1, 1, 2, 3, 4)
    for into in (torch.zeros(4, 3).T, torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 5)):
        with pytest.raises(ValueError, match="expected a contiguous float32 total of 12 elements; got"):
            totals.weighted_sum(left, right, torch.ones(1), into)


def test_blocks_refuse_sizes_without_a_bound():
    for tile, width in ((8, 16), (16, 128), (24, 16), (256, 16)):
        with pytest.raises(ValueError, match="a tile of 16 to 128 and a width of 16 to 64"):
            Blocks(tile, width, 4, 1)


# -- noise ----------------------------------------------------------------------------------------------------


def drawn(count, seed=7, stream=0, std=1.0):
    return philox_kernel.add_normal(torch.zeros(count), std, seed, stream)


def test_philox_known_answers():
    # Random123, kat_vectors: philox4x32 10.
    ones = 0xFFFFFFFF
    for word, answer in (
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        counter = tuple(np.array([word], dtype=np.uint64) for _ in range(4))
        got = philox_kernel.philox(counter, word | word << 32)
        assert tuple(int(x[0]) for x in got) == answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 511, 513, 1025, 3000])
def test_noise_is_the_stated_stream(count, dtype):
    for seed, stream in ((0, 0), (1, 1), (2**64 - 1, 2**63), (2**40 + 5, 2**32)):
        values = torch.arange(count, dtype=dtype)
        expected = (values.double() + 2.5 * philox_kernel.reference_normal(count, seed, stream)) * 0.25
        got = philox_kernel.add_normal(values, 2.5, seed, stream, factor=0.25)
        assert got is values
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_noise_is_normal():
    count = 3 << 17
    sample = drawn(count).double()
    assert abs(sample.mean()) < 5 / count**0.5
    assert abs(sample.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs(sample.pow(3).mean()) < 5 * (15 / count) ** 0.5
    assert abs(sample.pow(4).mean() - 3) < 5 * (96 / count) ** 0.5
    assert stats.kstest(sample.numpy(), "norm").pvalue > 1e-3
    # The same test sees a scale that is off by 2%.
    assert stats.kstest(1.02 * sample.numpy(), "norm").pvalue < 1e-6
    assert (sample.unique().numel()) > 0.99 * count * (1 - count / 2**25)


def test_streams_are_reproducible_and_independent():
    count = 1 << 15
    reference = drawn(count)
    assert torch.equal(reference, drawn(count))
    assert torch.equal(reference[:1000], drawn(1000))
    for seed, stream in ((8, 0), (7, 1), (7 + 2**32, 0), (7, 2**32), (7, 2**63)):
        other = drawn(count, seed, stream)
        assert abs((reference * other).mean()) < 5 / count**0.5
        assert abs((reference.square() * other.square()).mean() - 1) < 5 * (8 / count) ** 0.5
    halves = reference.view(-1, 2, philox_kernel.HALF)
    assert abs((halves[:, 0] * halves[:, 1]).mean()) < 5 / (count / 2) ** 0.5


def test_noise_reaches_the_stated_tail():
    smallest = 0.5 * 2.0**-64
    assert math.sqrt(-2 * math.log(smallest)) == pytest.approx(philox_kernel.LARGEST)
    assert philox_kernel._float32_above(0.1) >= 0.1
    assert philox_kernel._float32_above(0.3) >= 0.3
    assert philox_kernel._float32_above(0.5) == 0.5


def test_noise_refuses():
    with pytest.raises(ValueError, match=r"contiguous float32 or float64 values; got torch\.bfloat16"):
        philox_kernel.add_normal(torch.zeros(3, dtype=torch.bfloat16), 1.0, 0, 0)
    with pytest.raises(ValueError, match=r"got torch\.float32 with strides"):
        philox_kernel.add_normal(torch.zeros(3, 2).T, 1.0, 0, 0)
    for std, seed, stream in ((math.nan, 0, 0), (-1.0, 0, 0), (1.0, 1 << 64, 0), (1.0, 0, -1)):
        with pytest.raises(ValueError, match="a finite std >= 0 and a seed and a stream of 64 bits"):
            philox_kernel.add_normal(torch.zeros(3), std, seed, stream)


# -- trust ----------------------------------------------------------------------------------------------------


@pytest.fixture
def as_available(monkeypatch):
    monkeypatch.setattr(trust, "_verdicts", {})
    monkeypatch.setattr(trust, "available", lambda device: True)
    monkeypatch.setattr(trust, "_SHAPES", ((2, 1, 17, 18, 19),))


def test_trusted_when_they_agree_and_asked_once(as_available, monkeypatch):
    assert trust.trusted("cpu")
    monkeypatch.setattr(trust, "_agree", None)
    assert trust.trusted("cpu")


@pytest.mark.parametrize(
    ("module", "name", "blamed"),
    [
        ("ghost", "ghost_sq_norm", "norms"),
        ("formed", "formed_sq_norm", "norms"),
        ("totals", "weighted_sum", "weighted sum"),
    ],
)
def test_a_wrong_kernel_warns_once_and_is_not_used(as_available, monkeypatch, module, name, blamed):
    kernel = getattr(globals()[module], name)

    def wrong(*given):
        got = kernel(*given)
        first = got[0] if isinstance(got, tuple) else got
        first.mul_(0.98)
        return got

    monkeypatch.setattr(globals()[module], name, wrong)
    with pytest.warns(
        UserWarning, match=f"expected the Triton kernels on cpu to agree.*{blamed}.*off|differ"
    ):
        assert not trust.trusted("cpu")
    assert not trust.trusted("cpu")


def test_wrong_noise_warns_once_and_leaves_the_other_kernels(as_available, monkeypatch):
    monkeypatch.setattr(philox_kernel, "add_normal", lambda *given, factor: None)
    with pytest.warns(UserWarning, match="from the kernel of the noise, a largest difference"):
        assert not philox.trusted("cpu")
    assert not philox.trusted("cpu")
    assert trust.trusted("cpu")


def test_the_noise_is_trusted_by_a_check_of_its_own(as_available, monkeypatch):
    assert philox.trusted("cpu")
    monkeypatch.setattr(trust, "_agree", None)
    assert philox.trusted("cpu")


def test_a_kernel_that_does_not_compile_is_not_used(as_available, monkeypatch):
    def broken(*given):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(ghost, "ghost_sq_norm", broken)
    with pytest.warns(UserWarning, match="RuntimeError: no compiler; nothing to do"):
        assert not trust.trusted("cpu")


def test_the_wrappers_reach_the_kernels():
    left, right = pair(1, 1, 4, 3, 2)
    assert kernels.ghost_sq_norm(left, right)[0].shape == (1,)
    assert kernels.formed_sq_norm(left, right).shape == (1,)
    assert kernels.weighted_sum(left, right, torch.ones(1), torch.zeros(1, 3, 2)).shape == (1, 3, 2)
    assert philox.add_normal(torch.zeros(3), 1.0, 0, 0).numel() == 3
