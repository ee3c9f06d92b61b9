# SPDX-License-Identifier: Apache-2.0
"""The Gaussian mechanism on a grid: what it charges covers exactly what it does, rounding included."""

import math
from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from accountants import Composed, Gaussian, PoissonSampled, accountant
from accountants.dominating_pairs.gaussian import gaussian_delta, sampled_delta
from clipping import ClippedSum, FlatClipper
from clipping.contributions.clipped_sum import Group
from dpopt import GaussianMechanism, GroupGaussianMechanism, PoissonSampling
from dpopt.mechanisms import GridGaussianMechanism, grid_gaussian, gridded, integer_sums, summation_rounding
from dpopt.mechanisms.grid_gaussian import ROUNDING, fineness, whole
from dpopt.mechanisms.integer_sums import release_whole, whole_example
from dpopt.randomness import generator, insecure_key, ziggurat
from dpopt.randomness.cipher import cipher_key
from dpopt.release.randomness_tiers import FastTier, SecureTier, tier
from tests.support.dpopt.normality import p_of_correlation, p_of_mean, p_of_scale, p_of_shape
from tests.support.dpopt.private_runs import clipped_mean, examples, explicit, losses_of, mlp

SMALL = 1e-7
KEY = insecure_key(11)


def source(charge=1):
    return SecureTier(KEY).noise(charge)


def grid(noise_multiplier, **options):
    return GridGaussianMechanism(GaussianMechanism(noise_multiplier), **options)


def zeros(dtype=torch.float32):
    return {"large": torch.zeros(900, 800, dtype=dtype), "small": torch.zeros(7, dtype=dtype)}


# -- the guarantee, by exact computation ------------------------------------------------------------------


def law(scale, shift, reach):
    """P(floor(scale * Z) + shift = k) for k from -reach to reach."""
    edges = (np.arange(-reach, reach + 2) - shift) / scale
    # The tail of the nearer side, lest differences of numbers near 1 lose their digits.
    upper, lower = special.ndtr(-edges), special.ndtr(edges)
    return np.where(edges[:-1] > 0, upper[:-1] - upper[1:], lower[1:] - lower[:-1])


def hockey(p, q, epsilon):
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


@pytest.mark.parametrize("noise_multiplier", [0.6, 1.0, 3.0])
def test_guarantee_the_exact_curve_never_exceeds_the_charge(noise_multiplier):
    """All whole shifts within the charged cells, in one and two dimensions, with and without a Poisson sample."""
    scale, reach = 12, 200
    allowed = math.floor(scale / noise_multiplier)
    still = law(scale, 0, reach)
    moved = {t: law(scale, t, reach) for t in range(allowed + 1)}
    for epsilon in (0.0, 0.3, 1.0, 2.5, 5.0):
        charged = gaussian_delta(1 / noise_multiplier, epsilon)
        for t in range(1, allowed + 1):
            assert hockey(moved[t], still, epsilon) <= charged * (1 + 1e-9) + 1e-14
            for rate in (0.01, 0.3):
                mixed = (1 - rate) * still + rate * moved[t]
                found = max(hockey(mixed, still, epsilon), hockey(still, mixed, epsilon))
                assert found <= sampled_delta(1 / noise_multiplier, rate, epsilon) * (1 + 1e-9) + 1e-14
        for s in range(allowed + 1):
            t = math.isqrt(allowed * allowed - s * s)
            pair, none = (np.outer(a, b) for a, b in ((moved[s], moved[t]), (still, still)))
            assert hockey(pair, none, epsilon) <= charged * (1 + 1e-9) + 1e-14
    # The bound is nearly reached, so that it means something.
    assert hockey(moved[allowed], still, 1.0) > 0.5 * gaussian_delta(1 / noise_multiplier, 1.0)


def test_rounding_that_nobody_paid_for_breaks_the_charge():
    """A coarse grid without the sqrt(d) of its rounding: neighbours at distance 1 are up to sqrt(2) * 4 / 3.02 apart."""
    cells = 3.02
    below, above = np.array([[0.49, 0.49], [0.49 + cells / math.sqrt(2)] * 2]) / cells
    assert np.linalg.norm(above - below) <= 1 + 1e-12
    first, second = whole(below, cells), whole(above, cells)
    apart = np.linalg.norm(second - first)
    assert apart > cells
    one, other = whole(np.array([0.49]) / cells, cells), whole(np.array([0.49 + cells]) / cells, cells)
    shift = int((other - one)[0])
    assert shift == 4
    exact = hockey(law(cells, shift, 100), law(cells, 0, 100), 1.0)
    assert exact > 1.3 * gaussian_delta(1.0, 1.0)
    honest = cells + 1.25  # cells of noise that the same rounding is charged with
    assert hockey(law(honest, shift, 100), law(honest, 0, 100), 1.0) <= gaussian_delta(1.0, 1.0)


@given(
    st.integers(1, 50),
    st.floats(0.05, 200),
    st.sampled_from([1e-6, 1.0, 1e5]),
    st.floats(0, 2.0**-10),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["anything", "halves", "huge"]),
)
def test_guarantee_neighbouring_sums_stay_within_the_charged_cells(
    size, ratio, sensitivity, excess, seed, kind
):
    """Also at a scale of few cells, where rounding is most of the distance, and where the sum is clamped."""
    draw = np.random.default_rng(seed)
    for scale in (64.0, float(ziggurat.SCALE)):
        cells = scale / ratio - 1.25 * math.sqrt(size)
        if cells <= 0:
            continue
        fine = cells * grid_gaussian._DOWN / (sensitivity * (1 + ROUNDING))
        start = {"anything": 100 * draw.standard_normal(size) * sensitivity,
                 "halves": (draw.integers(-9, 9, size) + 0.4999999) / fine,
                 "huge": draw.choice([-1, 1], size) * 2.0**51 / fine}[kind]  # fmt: skip
        step = draw.standard_normal(size)
        step *= sensitivity * (1 + excess) / np.linalg.norm(step)
        moved = whole(start + step, fine) - whole(start, fine)
        blur = (
            np.linalg.norm(np.spacing(start) + np.spacing(start + step)) * fine
        )  # of this test's own addition
        assert np.linalg.norm(moved) <= scale / ratio + blur


def test_the_grid_leaves_room_for_its_own_rounding():
    for ratio, size in ((0.3, 1), (1.0, 124_000_000), (20.0, 10**9)):
        cells = Fraction(fineness(2.5, ratio, size, ROUNDING)) * Fraction(2.5) * (1 + Fraction(ROUNDING))
        assert float(cells) + 1.25 * math.sqrt(size) <= ziggurat.SCALE / ratio
        enlarged = ziggurat.SCALE / ratio / (fineness(2.5, ratio, size, 0.0) * 2.5) - 1
        assert enlarged < 1.01 * 1.25 * math.sqrt(size) * ratio / ziggurat.SCALE + 1e-11
    assert ziggurat.SCALE / (fineness(1.0, 1.0, 124_000_000, 0.0)) - 1 < 6e-5
    with pytest.raises(ValueError, match="expected noise below"):
        fineness(1.0, 5000.0, 10**9, 0.0)


def test_every_accountant_prices_it_as_the_gaussian():
    event = PoissonSampling(0.01, 1.0).event(grid(1.1).event())
    assert event == PoissonSampled(0.01, Gaussian(1.1))
    for name in ("rdp", "prv", "pld"):
        assert 0 < accountant(name).curve(Composed((event,))).epsilon(1e-5) < 5


# -- the noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_guarantee_noise_has_the_stated_scale(dtype):
    steps = [grid(1.7).release(ClippedSum(zeros(dtype), 0.3), source(i), 12.5) for i in range(3)]
    assert all(value.dtype == dtype for step in steps for value in step.values())
    unit = 1.7 * 0.3 * (1 + ROUNDING) / 12.5
    z = np.concatenate([step["large"].double().numpy().ravel() for step in steps]) / unit
    for fault in (0.98, 1.02):
        assert p_of_scale(fault * z) < SMALL and p_of_shape(fault * z) < SMALL
    assert min(p_of_scale(z), p_of_shape(z), p_of_mean(z)) > SMALL
    assert z.std() >= 1 - 3e-3  # never below what is charged, but for chance
    parts = [*(step["large"].double().numpy().ravel() for step in steps)]
    for a, b in pairwise([*parts, parts[0][::-1]]):
        assert p_of_correlation(a / unit, b / unit) > SMALL
    assert (
        p_of_correlation(
            parts[0][: grid_gaussian.PART // 4], parts[0][grid_gaussian.PART :][: grid_gaussian.PART // 4]
        )
        > SMALL
    )


def test_outputs_lie_on_the_grid_whatever_the_sum():
    torch.manual_seed(3)
    total = {
        "a": torch.randn(5000, dtype=torch.float64) * 7,
        "b": torch.full((100,), 2.0**-25, dtype=torch.float64),
    }
    fine = fineness(1.0, 1.0, 5100, ROUNDING)
    released = grid(1.0).release(ClippedSum(total, 1.0), source(), 1.0)
    for value in released.values():
        cells = (value * fine).numpy() - 0.5
        assert np.abs(cells - np.rint(cells)).max() < 1e-5
    ordinary = torch.randn(5000, dtype=torch.float64).numpy() * fine
    assert np.abs(ordinary - np.rint(ordinary)).max() > 0.4


def test_the_sum_itself_comes_through():
    total = {"a": torch.full((400, 50), 3.0), "b": torch.full((7,), -1e30)}
    released = grid(1e-3).release(ClippedSum(total, 1.0), source(), 2.0)
    assert abs(float(released["a"].mean()) - 1.5) < 1e-4
    assert released["a"] is total["a"]
    assert bool(torch.isfinite(released["b"]).all())


def test_noise_does_not_depend_on_threads_or_memory_format(monkeypatch):
    monkeypatch.setattr(grid_gaussian, "PART", 1 << 12)
    size = 5 * (1 << 12) + 3
    key = cipher_key(KEY, "noise")
    alone, together = torch.zeros(size), torch.zeros(size)
    grid_gaussian.add_whole_normal(alone, 1.0, key)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(grid_gaussian.os, "cpu_count", lambda: 4)
    grid_gaussian.add_whole_normal(together, 1.0, key)
    assert torch.equal(alone, together)
    image = torch.zeros(8, 3, 5, 5).to(memory_format=torch.channels_last)
    released = grid(1.0).release(ClippedSum({"w": image}, 1.0), source())["w"]
    assert released.shape == image.shape and released.std() > 0.8


def test_groups_have_grids_of_their_own():
    total = {"a": torch.zeros(300_000), "b": torch.zeros(40_000)}
    groups = (Group(("a",), 0.8), Group(("b",), 0.6))
    mechanism = GroupGaussianMechanism(1.3)
    stds = mechanism.stds([0.8, 0.6], [300_000, 40_000])
    released = gridded(mechanism).release(ClippedSum(total, 1.0, groups), source())
    for (name, value), std in zip(released.items(), stds, strict=True):
        assert p_of_scale(value.double().numpy() / std / (1 + ROUNDING)) > SMALL, name
    parts = gridded(mechanism).cells(
        ClippedSum(zeros(), 1.0, (Group(("large",), 0.8), Group(("small",), 0.6)))
    )
    assert math.isclose(sum(part.ratio**-2 for part in parts), 1.3**-2)
    with pytest.raises(ValueError, match="expected a clipped sum that knows its groups"):
        gridded(mechanism).release(ClippedSum(zeros(), 1.0), source())


def test_no_noise_only_when_asked_for():
    total = {"a": torch.ones(3)}
    assert torch.equal(grid(0.0).release(ClippedSum(total, 1.0), source(), 4.0)["a"], torch.full((3,), 0.25))
    assert accountant("rdp").curve(grid(0.0).event()).epsilon(1e-5) == math.inf


def test_refusals():
    with pytest.raises(ValueError, match="expected a cipher's key for the noise of large"):
        grid(1.0).release(ClippedSum(zeros(), 1.0), lambda name, device: torch.Generator())
    for rounding in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a finite rounding >= 0"):
            grid(1.0, rounding=rounding)
    with pytest.raises(ValueError, match="expected a GaussianMechanism or a GroupGaussianMechanism"):
        gridded(object())
    assert gridded(grid(2.0)) == grid(2.0)

    class Other(GaussianMechanism):
        __slots__ = ()

    with pytest.raises(ValueError, match="got Other"):
        gridded(Other(1.0))


# -- what float sums add ----------------------------------------------------------------------------------


def test_the_excess_of_float_sums_is_bounded():
    """Running float32 sums of clipped vectors against exact ones, ordinary and aligned; float64 gains 2^29."""
    torch.manual_seed(0)
    for num in (10, 300):
        aligned = torch.nn.functional.normalize(torch.ones(50) + 0.01 * torch.randn(num, 50), dim=1)
        for rows in (torch.nn.functional.normalize(torch.randn(num, 50), dim=1), aligned):
            running, without = torch.zeros(50), torch.zeros(50)
            for row in rows:
                running += row
            for row in rows[1:]:
                without += row
            # Rows may be longer than 1 by a rounding of their own.
            excess = float((running - without).double().norm() / rows[0].double().norm()) - 1
            assert excess <= summation_rounding(num, num)
    assert summation_rounding(256, 31) < ROUNDING < summation_rounding(256, 256)
    assert summation_rounding(4096, 4096, torch.float64) < 1e-8


# -- whole sums -------------------------------------------------------------------------------------------


def squares(summed, names):
    return sum(int(x) ** 2 for name in names for x in summed.total[name].flatten().tolist())


@pytest.mark.parametrize("kind", ["at the limit", "beyond", "zero", "huge", "infinite", "nan"])
def test_guarantee_whole_examples_keep_to_the_radius(kind):
    """In Python's own integers; a gradient that floats let grow is shortened, one that is no number dropped."""
    torch.manual_seed(1)
    factor = {"at the limit": 1.0, "beyond": 1 + 1e-6, "zero": 0.0, "huge": 1e30}.get(kind, 1.0)
    row = torch.nn.functional.normalize(torch.randn(3000, dtype=torch.float64), dim=0) * factor
    if kind in ("infinite", "nan"):
        row[5] = math.inf if kind == "infinite" else math.nan
    clipped = ClippedSum({"a": row[:2000].float(), "b": row[2000:].float().reshape(10, 100)}, 1.0)
    for ratio in (0.1, 1.0, 40.0):
        summed = whole_example(clipped, grid(ratio))
        radius = Fraction(ziggurat.SCALE) / Fraction(ratio)
        found = squares(summed, ("a", "b"))
        assert found <= radius * radius
        assert found == 0 if kind in ("zero", "infinite", "nan") else found > 0.999 * radius * radius


def test_whole_sums_do_not_depend_on_the_order():
    torch.manual_seed(2)
    rows = torch.nn.functional.normalize(torch.randn(40, 500), dim=1)
    parts = [whole_example(ClippedSum({"w": row}, 1.0), grid(0.7)) for row in rows]

    def total(order):
        result = whole_example(ClippedSum({"w": torch.zeros(500)}, 1.0), grid(0.7))
        for i in order:
            result = result + parts[i]
        return result.total["w"]

    assert torch.equal(total(range(40)), total(reversed(range(40))))
    assert torch.equal(total(range(40)) - total(range(1, 40)), parts[0].total["w"])
    ratio = total(range(40)).double() * 0.7 / ziggurat.SCALE
    torch.testing.assert_close(ratio, rows.double().sum(0), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="expected two sums on the same grid"):
        parts[0] + whole_example(ClippedSum({"w": rows[0]}, 1.0), grid(0.8))


def test_whole_sums_are_released_with_the_charged_noise():
    zero = whole_example(ClippedSum(zeros(), 0.3), grid(1.7))
    released = release_whole(zero, source(), 12.5)
    z = released["large"].double().numpy().ravel() / (1.7 * 0.3 / 12.5)
    assert released["large"].shape == (900, 800) and released["large"].dtype == torch.float32
    assert p_of_scale(1.02 * z) < SMALL < min(p_of_scale(z), p_of_shape(z), p_of_mean(z))
    one = whole_example(ClippedSum({"w": torch.full((4,), 0.5, dtype=torch.float64)}, 1.0), grid(0.02))
    assert release_whole(one, source())["w"].dtype == torch.float64
    assert release_whole(one, source())["w"].sub(0.5).abs().max() < 6 * 0.02
    with pytest.raises(ValueError, match="expected noise of at least"):
        whole_example(ClippedSum(zeros(), 1.0), grid(integer_sums.LEAST_RATIO / 2))


def test_whole_sums_of_a_real_step_are_its_clipped_sum():
    model, data, mechanism = mlp(), examples(8), grid(0.02)
    with explicit(model, clip=0.5) as private:
        batch = next(private.batches(data, steps=1))
        summed = whole_example(private.sum.clipped(), mechanism)
        for part in batch.split(1):
            private.accumulate(losses_of(model, part))
            summed = summed + whole_example(private.sum.clipped(), mechanism)
    exact = {name: value.double() * 0.02 * 0.5 / ziggurat.SCALE / 8 for name, value in summed.total.items()}
    for name, expected in clipped_mean(model, data, clip=0.5).items():
        torch.testing.assert_close(exact[name].float(), expected, rtol=1e-5, atol=1e-7)
        released = release_whole(summed, source(), 8.0)[name]
        assert (released - expected).abs().max() < 6 * 0.02 * 0.5 / 8


# -- tiers ------------------------------------------------------------------------------------------------


def test_the_secure_tier_draws_and_noises_from_the_cipher():
    secure, sampling = SecureTier(KEY), PoissonSampling(0.3, 5.0)
    draws = [secure.draw(sampling, 1000, number) for number in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert abs(len(draws[0]) - 300) < 90

    def release(charge):
        return secure.release(GaussianMechanism(1.0), ClippedSum(zeros(), 1.0), charge, 2.0)

    first, again, other = release(1), release(1), release(2)
    assert torch.equal(first["large"], again["large"]) and not torch.equal(first["large"], other["large"])
    assert not torch.equal(first["large"].flatten()[:7], first["small"])
    direct = grid(1.0).release(ClippedSum(zeros(), 1.0), lambda n, d: cipher_key(KEY, "noise", 1, n), 2.0)
    assert torch.equal(direct["small"], first["small"])


def test_tiers_by_name():
    assert tier("fast", KEY) == FastTier(KEY) and tier("secure", KEY) == SecureTier(KEY)
    with pytest.raises(ValueError, match=r"expected randomness in \('fast', 'secure'\); got 'best'"):
        tier("best", KEY)
    for each in (FastTier(KEY), SecureTier(KEY)):
        each.check(GaussianMechanism(1.0), PoissonSampling(0.1, 1.0))
        assert each.assumptions and KEY.secret.hex() not in repr(each)
    with pytest.raises(ValueError, match="has no exact sampler"):
        SecureTier(KEY).check(object(), PoissonSampling(0.1, 1.0))


def test_the_fast_tier_is_the_mechanism_as_it_was():
    sampling = PoissonSampling(0.3, 5.0)
    assert FastTier(KEY).draw(sampling, 50, 4) == sampling.draw(50, generator(KEY, "sampling", 4))
    mechanism = GaussianMechanism(2.0)
    released = FastTier(KEY).release(mechanism, ClippedSum(zeros(), FlatClipper(1.0).sensitivity), 3, 2.0)
    expected = mechanism.release(ClippedSum(zeros(), 1.0), partial(FastTier(KEY).noise, 3), 2.0)
    assert torch.equal(released["large"], expected["large"])
