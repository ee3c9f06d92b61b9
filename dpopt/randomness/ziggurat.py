# SPDX-License-Identifier: Apache-2.0
"""Whole parts of ideal normal noise, by integer arithmetic: floor(SCALE * Z) with Z standard normal, exactly.

The half-normal density f(x) = exp(-x^2 / (2 SCALE^2)) lies under 256 strips of one exact area (Marsaglia and Tsang
2000, J. Stat. Softw. 5(8), the ziggurat; Buchmann et al. 2013, SAC, the same over integers). Strip i has the real
heights [y_i, y_{i+1}) and the positions [0, X_i), X_i an integer. A uniform strip, position x and height y make a
uniform point of their union; given y < f(x), x is half-normal; a sign makes it normal. Only floor(x) is wanted, so x
and y are real numbers of which bits are read until the answer is certain (Karney 2016, arXiv:1303.6257):

- 55 bits of x settle floor(x), and left of the curve's crossing with the strip's upper edge also y < f(x): 98 %;
- else 53 bits of y and one exponential in float64, with a margin 2^8 times its error;
- within that margin (one number of 10^10) more bits and decimal arithmetic, rounded in known directions.

Words are read as: strip 8 bits, sign 1, position 55, from low to high.
"""

from __future__ import annotations

import decimal
import functools
import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from dpopt.randomness.cipher import Words, WordStream

SCALE = 1 << 28
"""The standard deviation of the noise, in cells of the grid."""

REACH = 40
"""Positions end at 40 standard deviations; a true normal goes beyond with probability 7e-350."""

_STRIPS = 256
_AREA = 1_328_151  # the least whole number for which the strips reach the density's peak, 1
_SPLIT = 5  # the lowest strip is 2^5 times wider than its positions count, so that these stay below 2^31
_CHUNK = 1 << 14
_LAST = (1 << 32) - 257  # beyond it, the bits of a position after the 55th may carry into its whole part
_MARGIN = 2.0**-40


@dataclass(frozen=True, slots=True, eq=False)
class Strips:
    """The strips, from the axis up: exact for the proof, in float64 for the work.

    A position below `inner` cells lies under the density whatever its height in the strip; the lowest strip's
    positions count 2^5 cells each, and its `inner` is 0.
    """

    widths: NDArray[np.int64]
    inner: NDArray[np.int64]
    bottoms: NDArray[np.float64]
    heights: NDArray[np.float64]
    exact_bottoms: tuple[Fraction, ...]
    exact_heights: tuple[Fraction, ...]


def _crossing(height: Fraction) -> Decimal:
    """The position at which the density has this height, 0 above its peak; to 40 digits at least."""
    if height >= 1:
        return Decimal(0)
    return SCALE * (-2 * (Decimal(height.numerator) / Decimal(height.denominator)).ln()).sqrt()


@functools.cache
def strips() -> Strips:
    """The strips; each is as wide as the density at its lower edge, and they reach beyond the peak."""
    bottoms, heights, widths, inner = [Fraction(0)], [], [], []
    with decimal.localcontext() as context:
        context.prec = 60
        for i in range(_STRIPS):
            width = REACH * SCALE if i == 0 else math.ceil(_crossing(bottoms[i])) + 1
            heights.append(Fraction(_AREA, width))
            bottoms.append(bottoms[i] + heights[i])
            widths.append(width >> _SPLIT if i == 0 else width)
            inner.append(0 if i == 0 else max(0, math.floor(_crossing(bottoms[i + 1])) - 1))
    assert bottoms[-1] >= 1 and max(widths) < 1 << 31
    return Strips(
        np.array(widths),
        np.array(inner),
        np.array([float(y) for y in bottoms[:-1]]),
        np.array([float(h) for h in heights]),
        tuple(bottoms[:-1]),
        tuple(heights),
    )


def whole_normals(count: int, stream: WordStream) -> Words:
    """`count` independent draws of floor(SCALE * Z), Z standard normal.

    Guarantees
    ----------
    P(k) = Phi((k + 1) / SCALE) - Phi(k / SCALE) for every k, given uniform words, up to the 7e-350 beyond `REACH`:
    no table, probability or comparison is rounded without a proof that the rounding decides nothing
    (test_guarantee_the_strips_cover_the_density, test_guarantee_shortcuts_agree_with_exact_arithmetic,
    test_guarantee_whole_normals_have_the_stated_law). Which values were drawn shows in the running time only
    through the number of heights compared; timing is outside the guarantee (Jin et al. 2022, arXiv:2112.05307).
    """
    table = strips()
    found = np.empty(count, dtype=np.int64)
    where, pending = [], []
    words, room = np.empty(min(count, _CHUNK), dtype=np.int64), _room(min(count, _CHUNK))
    for start in range(0, count, _CHUNK):
        part = found[start : start + _CHUNK]
        stream.fill(words[: part.size])
        left = _inner(words[: part.size], part, table, [x[: part.size] for x in room])
        where.append(left + start)
        pending.append(words[left])
    places, open_words = (np.concatenate(x) if x else np.empty(0, dtype=np.int64) for x in (where, pending))
    while places.size:
        accepted, values = _decided(open_words, table, stream)
        found[places[accepted]] = values[accepted]
        places = places[~accepted]
        open_words = stream.words(places.size)
    return found


def _room(size: int) -> list[Words]:
    return [np.empty(size, dtype=np.int64) for _ in range(3)]


def _inner(words: Words, into: Words, table: Strips, room: list[Words]) -> Words:
    """Write each word's value into `into`; return the places of those that need a comparison of heights."""
    # In place throughout: fresh arrays of this size cost more than the arithmetic.
    strip, width, low = room
    np.bitwise_and(words, 255, out=strip)
    np.take(table.widths, strip, out=width, mode="clip")
    position = _positions(words, width, into, low)
    np.take(table.inner, strip, out=width, mode="clip")
    np.bitwise_and(position, 0xFFFFFFFF, out=low)
    whole = np.right_shift(position, 32, out=into)
    settled = np.less(whole, width)
    np.logical_and(settled, np.less_equal(low, _LAST), out=settled)
    np.bitwise_xor(whole, _signs(words, strip), out=into)
    return np.flatnonzero(~settled)


def _positions(words: Words, widths: Words, into: Words, room: Words) -> Words:
    """The 55-bit fraction of each word times its width < 2^31, in units of 2^-32, rounded down."""
    high = np.right_shift(words.view(np.uint64), np.uint64(32), out=into.view(np.uint64)).view(np.int64)
    np.multiply(high, widths, out=high)
    low = np.right_shift(words, 9, out=room)
    np.bitwise_and(low, (1 << 23) - 1, out=low)
    np.multiply(low, widths, out=low)
    np.right_shift(low, 23, out=low)
    return np.add(high, low, out=high)


def _signs(words: Words, into: Words) -> Words:
    """0 or -1; k ^ -1 is -1 - k, the floor of minus a number in (k, k + 1)."""
    np.right_shift(words, 8, out=into)
    np.bitwise_and(into, 1, out=into)
    return np.negative(into, out=into)


def _decided(words: Words, table: Strips, stream: WordStream) -> tuple[NDArray[np.bool_], Words]:
    """Which points lie under the density, and their values."""
    strip = words & 255
    position = _positions(words, table.widths[strip], np.empty_like(words), np.empty_like(words))
    whole, low = position >> 32, position & 0xFFFFFFFF
    more = stream.words(words.size)  # 53 bits of height above, the place within 2^5 cells below
    whole = np.where(strip == 0, (whole << _SPLIT) + (more & 31), whole)
    x = (whole + low * 2.0**-32) / SCALE
    y = table.bottoms[strip] + (more.view(np.uint64) >> np.uint64(11)) * 2.0**-53 * table.heights[strip]
    excess = np.exp(-x * x / 2) - y
    accepted = excess > 0
    for index in np.flatnonzero((np.abs(excess) <= _MARGIN) | (low > _LAST)):
        accepted[index], whole[index] = _exactly(int(words[index]), int(more[index]), table, stream)
    return accepted, whole ^ _signs(words, strip)


def _exactly(word: int, more: int, table: Strips, stream: WordStream) -> tuple[bool, int]:
    """Whether the point of these bits, and as many further ones as it takes, lies under the density; its cell."""
    word, more = word % (1 << 64), more % (1 << 64)
    strip, position, height, bits = word & 255, word >> 9, more >> 11, 0
    width = int(table.widths[strip])
    while True:
        whole, rest = divmod(width * position, 1 << (55 + bits))
        if rest + width <= 1 << (55 + bits):
            cell = (whole << _SPLIT) + (more & 31) if strip == 0 else whole
            unit = Fraction(1, 1 << (55 + bits))
            above = _density(cell + rest * unit, up=True, bits=bits)
            below = _density(cell + (rest + width) * unit, up=False, bits=bits)
            least = (
                Fraction(height, 1 << (53 + bits)) * table.exact_heights[strip] + table.exact_bottoms[strip]
            )
            most = least + table.exact_heights[strip] / (1 << (53 + bits))
            if most <= below or least >= above:
                return most <= below, cell
        position = (position << 64) + stream.integer()
        height = (height << 64) + stream.integer()
        bits += 64


def _density(x: Fraction, *, up: bool, bits: int) -> Fraction:
    """exp(-x^2 / (2 SCALE^2)) for x <= REACH * SCALE, rounded up or down, to 30 digits and more with `bits`."""
    exponent = x * x / (2 * SCALE * SCALE)
    with decimal.localcontext() as context:
        # Decimal's quotient and exponential are correctly rounded; an exponent of up to 800 multiplies the error
        # of the first, which 10^6 units of the last place cover.
        context.prec = 40 + bits
        value = (-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp()
    return Fraction(value) * (1 + (1 if up else -1) * Fraction(1, 10 ** (34 + bits)))
