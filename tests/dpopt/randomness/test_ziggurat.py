# SPDX-License-Identifier: Apache-2.0
"""The sampler of whole normals: its proof obligations one by one in exact arithmetic, then the law of its draws."""

from fractions import Fraction
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from scipy import stats

from dpopt.randomness import ziggurat
from dpopt.randomness.cipher import CipherKey
from dpopt.randomness.ziggurat import REACH, SCALE, strips, whole_normals
from tests.support.dpopt.normality import p_of_mean, p_of_scale, p_of_shape
from tests.support.dpopt.scripted_words import Scripted

SMALL = 1e-7
KEY = CipherKey(b"the key of these tests, no secret"[:32])


def crossing(height):
    with mpmath.workdps(50):
        return SCALE * mpmath.sqrt(-2 * mpmath.log(mpmath.mpf(height.numerator) / height.denominator))


def test_guarantee_the_strips_cover_the_density():
    """Equal exact areas, no gap, up to the peak; each as wide as the density; inner cells wholly below it."""
    table = strips()
    y, h = table.exact_bottoms, table.exact_heights
    widths = [int(table.widths[0]) * 32, *map(int, table.widths[1:])]
    assert len(y) == 256 and y[0] == 0 and widths[0] == REACH * SCALE
    assert len({w * x for w, x in zip(widths, h, strict=True)}) == 1
    assert all(y[i] + h[i] == y[i + 1] for i in range(255)) and y[255] + h[255] >= 1
    for i in range(1, 256):
        assert crossing(y[i]) <= widths[i] < 2**31
        assert y[i] + h[i] >= 1 or table.inner[i] <= crossing(y[i] + h[i])
    assert table.inner[0] == 0 == table.inner[255]
    assert np.abs(table.bottoms - [float(x) for x in y]).max() == 0
    assert np.mean(table.inner / table.widths) > 0.975


def bits(strip, sign, position):
    return strip | sign << 8 | position << 9


def exactly(word, more, *further):
    return ziggurat._exactly(word, more, strips(), Scripted(*further))


def test_guarantee_shortcuts_agree_with_exact_arithmetic():
    table = strips()
    words = KEY.stream(1).words(4000)
    words[1000:2000] &= ~255  # the lowest strip
    words[2000:3000] = (words[2000:3000] & ~255) | 255  # the highest
    more = KEY.stream(2).words(4000)
    accepted, values = ziggurat._decided(words, table, KEY.stream(2))
    into = np.empty_like(words)
    left = set(ziggurat._inner(words, into, table, ziggurat._room(4000)).tolist())
    for i in range(4000):
        under, cell = exactly(int(words[i]), int(more[i]))
        assert (accepted[i], values[i]) == (under, ~cell if words[i] >> 8 & 1 else cell)
        assert i in left or (under and into[i] == values[i])
    assert accepted.all() != accepted.any() and len(left) > 1000


@pytest.mark.parametrize("strip", [1, 100, 254])
def test_a_point_on_the_curve_is_decided_by_further_bits(strip):
    """Heights within 2^-53 of the density cannot be told apart by the first bits, and float64 must not try."""
    table = strips()
    y, h, width = table.exact_bottoms[strip], table.exact_heights[strip], int(table.widths[strip])
    position = ((int(table.inner[strip]) + width) << 54) // width
    below = ziggurat._density(Fraction(width * position, 1 << 55), up=False, bits=0)
    height = int((below - y) / h * 2**53)
    more = height << 11
    word = bits(strip, 0, position)
    under, _ = exactly(word, more, 0, 0)
    over, _ = exactly(word, more, 2**64 - 1, 2**64 - 1)
    assert under and not over
    as_words = np.array([word], dtype=np.uint64).view(np.int64)
    for low, expected in ((0, True), (2**64 - 1, False)):
        accepted, _ = ziggurat._decided(as_words, table, Scripted(more, low, low))
        assert accepted[0] == expected


def test_a_position_at_the_end_of_a_cell_is_decided_by_further_bits():
    table = strips()
    width = int(table.widths[7])
    cell = int(table.inner[7]) - 5  # under the curve whatever the height
    position = ((cell + 1 << 55) - 1) // width
    word = bits(7, 1, position)
    words = np.array([word], dtype=np.uint64).view(np.int64)
    assert ziggurat._inner(words, words.copy(), table, ziggurat._room(1)).tolist() == [0]
    for low, expected in ((0, cell), (2**64 - 1, cell + 1)):
        assert exactly(word, 0, low, 0) == (True, expected)
        _, values = ziggurat._decided(words, table, Scripted(0, low, 0))
        assert values[0] == ~expected


def test_the_density_is_bounded_from_both_sides():
    with mpmath.workdps(80):
        for x in (Fraction(0), Fraction(1, 3), Fraction(SCALE), Fraction(7 * SCALE, 2), Fraction(39 * SCALE)):
            ratio = mpmath.mpf(x.numerator) / x.denominator / SCALE
            true = mpmath.exp(-ratio * ratio / 2)
            low, high = (ziggurat._density(x, up=up, bits=0) for up in (False, True))
            below, above = (mpmath.mpf(v.numerator) / v.denominator for v in (low, high))
            assert below < true < above < below * (1 + mpmath.mpf(10) ** -32)


@pytest.fixture(scope="module")
def drawn():
    return whole_normals(1_500_000, KEY.stream())


def test_guarantee_whole_normals_have_the_stated_law(drawn):
    z = (drawn + 0.5) / SCALE
    for fault in (0.98, 1.02):
        assert p_of_scale(fault * z) < SMALL and p_of_shape(fault * z) < SMALL
    assert p_of_mean(z + 0.01) < SMALL
    assert min(p_of_scale(z), p_of_shape(z), p_of_mean(z)) > SMALL
    for threshold in (3.0, 4.0):
        expected = 2 * stats.norm.sf(threshold)
        assert stats.binomtest(int((np.abs(z) > threshold).sum()), z.size, expected).pvalue > SMALL


def test_low_bits_and_neighbours_are_independent(drawn):
    for shift in (0, 8, 16):
        counts = np.bincount((drawn >> shift) & 255, minlength=256)
        assert stats.chisquare(counts).pvalue > SMALL
    z = (drawn + 0.5) / SCALE
    for lag in (1, 2, 1 << 14):
        assert abs(np.vdot(z[:-lag], z[lag:])) < 6 * z.size**0.5


def coarse(monkeypatch, scale):
    """The same algorithm at few cells, where each one's probability can be told apart."""
    monkeypatch.setattr(ziggurat, "SCALE", scale)
    monkeypatch.setattr(ziggurat, "_AREA", Fraction(scale, 150))
    monkeypatch.setattr(
        ziggurat, "_MARGIN", 2.0**-20
    )  # the 2^-22 cells of float64's position weigh more here
    monkeypatch.setattr(ziggurat, "strips", ziggurat.strips.__wrapped__)


def p_of_cells(values, scale):
    """Chi-square against the exact probabilities of floor(scale * Z)."""
    edges = range(-3 * scale, 3 * scale + 1)
    with mpmath.workdps(30):
        levels = [mpmath.ncdf(mpmath.mpf(k) / scale) for k in edges]
        law = [levels[0], *(b - a for a, b in pairwise(levels)), 1 - levels[-1]]
    cells = np.clip(values, edges[0] - 1, edges[-1]) - edges[0] + 1
    counts = np.bincount(cells, minlength=len(law))
    return stats.chisquare(counts, np.array([float(p) for p in law]) * values.size).pvalue


@pytest.mark.parametrize("scale", [8, 50])
def test_each_cell_has_its_exact_probability(monkeypatch, scale):
    coarse(monkeypatch, scale)
    values = whole_normals(1_000_000, KEY.stream())
    assert p_of_cells(values, scale) > SMALL
    wrong = np.floor(1.02 * scale * np.random.default_rng(1).standard_normal(1_000_000)).astype(np.int64)
    assert p_of_cells(wrong, scale) < SMALL


def test_the_same_stream_gives_the_same_values_and_no_count_is_special(drawn):
    for count in (0, 1, 2, 1000, (1 << 14) + 1):
        values = whole_normals(count, KEY.stream())
        assert values.shape == (count,) and values.dtype == np.int64
        assert np.mean(values == drawn[:count]) > 0.95 if count > 100 else True
    assert np.array_equal(drawn, whole_normals(drawn.size, KEY.stream()))
