# SPDX-License-Identifier: Apache-2.0
"""Where a falling price meets a budget, in few prices: a price may take a second.

The law of this file: what is returned has been priced, and its price is within the budget. Prices are rounded up by about
1e-4 of themselves, and so need not be monotone to the last digit.
"""

import math
from collections.abc import Callable, Sequence

Price = Callable[[float], float]
Found = tuple[float, float]
"""A place, and the logarithm of its price over the budget."""

_ROUNDS = 200
_AGREES = 4e-3


def least(
    prices: Sequence[Price], budget: float, *, start: float, low: float, high: float, width: float
) -> float | None:
    """Find the least x in [low, high] whose falling price is within `budget`, to a relative `width`; None if none is.

    Args:
        prices: fall as x grows; each begins where the one before it has met the budget, the last one decides.
        budget: above 0.
        start: where the first one begins.
        low: the smallest x of interest, which is returned if it is within the budget.
        high: the largest x of interest.
        width: relative to x.
    """
    ends = math.log(low), math.log(high)
    x, met, known = min(max(math.log(start), ends[0]), ends[1]), False, math.inf
    for price in prices:

        def gap(log_x: float, price: Price = price) -> float:
            value = price(math.exp(log_x))
            return (
                math.log(value / budget) if 0 < value < math.inf else math.copysign(math.inf, value - budget)
            )

        here = x, gap(x)
        if here[1] <= 0 and abs(here[1] - known) < _AGREES:
            continue  # the bracket that the last one found is this one's too
        bracket = _bracket(gap, here, *ends)
        met = bracket is not None
        if bracket is not None:
            x, known = _narrowed(gap, *bracket, width)
    return None if not met else low if x <= ends[0] else math.exp(x)


def _bracket(gap: Price, first: Found, low: float, high: float) -> tuple[Found | None, Found] | None:
    """Go from `first` to the other side of the root: a place too dear (None: not even `low` is), and one that is not."""
    here, stride = first, 0.0
    while True:
        x, value = here
        if value <= 0 and x <= low:
            return None, here
        if value > 0 and x >= high:
            return None
        # prices fall about like 1/x or 1/x^2
        wanted = 1.1 * abs(value) if abs(value) < 5 else 5.0
        stride = max(wanted, 2 * stride, 1e-3)
        there = x - stride if value <= 0 else x + stride
        there = min(max(there, low), high)
        other = there, gap(there)
        if (other[1] <= 0) != (value <= 0):
            return (other, here) if value <= 0 else (here, other)
        here = other


def _narrowed(gap: Price, dear: Found | None, within: Found, width: float) -> Found:
    """Close in on the root from both sides: by secants, and halves where these are slow."""
    for turn in range(_ROUNDS):
        if dear is None or within[0] - dear[0] <= width:
            break
        share = 0.5
        if turn % 4 < 3 and math.isfinite(dear[1]) and math.isfinite(within[1]):
            share = dear[1] / (dear[1] - within[1])
        span = within[0] - dear[0]
        guess = dear[0] + share * span
        # aim beside the root, so that the bracket closes from both sides
        guess += 0.4 * width if turn % 2 == 0 else -0.4 * width
        guess = min(max(guess, dear[0] + 0.3 * width), within[0] - 0.3 * width)
        value = gap(guess)
        dear, within = (dear, (guess, value)) if value <= 0 else ((guess, value), within)
    return within


def last(prices: Sequence[Callable[[int], float]], budget: float, *, start: int, most: int) -> int | None:
    """Find the last count in [0, most] whose growing price is within `budget`; None where that is `most`.

    `prices` begin each where the one before it has met the budget, the last one decides. A count of 0 is within.
    """
    found: int | None = start
    for price in prices:
        found = _last(price, budget, most if found is None else max(1, found), most)
    return found


def _last(price: Callable[[int], float], budget: float, count: int, most: int) -> int | None:
    inside, outside = (0, 0.0), (0, 0.0)
    while outside[0] == 0:
        value = price(count)
        if value > budget:
            outside = count, value
        elif count >= most:
            return None
        else:
            inside = count, value
            # prices grow about like the square root, or in proportion
            growth = min((budget / value) ** 1.5, 64.0) if value > 0 else 64.0
            count = min(most, max(count + 1, math.ceil(count * max(growth, 1.001))))
    if inside[0] == 0:
        inside, outside = _down(price, budget, outside)
    return _last_between(price, budget, inside, outside)


def _down(
    price: Callable[[int], float], budget: float, outside: tuple[int, float]
) -> tuple[tuple[int, float], tuple[int, float]]:
    """Go down from a count that is too dear to one that is not, 0 at the least; return it, and the last that is."""
    while outside[0] > 1:
        count, value = outside
        shrink = max(1 / 64, (budget / value) ** 1.1) if math.isfinite(value) else 1 / 64
        here = max(1, min(count - 1, int(count * shrink)))
        found = here, price(here)
        if found[1] <= budget:
            return found, outside
        outside = found
    return (0, 0.0), outside


def _last_between(
    price: Callable[[int], float], budget: float, inside: tuple[int, float], outside: tuple[int, float]
) -> int:
    """Find the last count within the budget between two: by interpolation, a little past the root, and by halves."""
    (low, at_low), (high, at_high), moved, turn = inside, outside, 0, 0
    while high - low > 1:
        turn += 1
        guess = (low + high) // 2
        if turn % 5 and low and 0 < at_low < at_high < math.inf:
            share = math.log(budget / at_low) / math.log(at_high / at_low) if at_low < budget else 0.0
            guess = round(low * (high / low) ** share)
            past = max(1, abs(guess - (low if moved < 0 else high)) // 8)
            guess += past if moved < 0 else -past if moved > 0 else 0
        guess = min(max(guess, low + 1), high - 1)
        value = price(guess)
        moved = -1 if value <= budget else 1
        (low, at_low, high, at_high) = (
            (guess, value, high, at_high) if value <= budget else (low, at_low, guess, value)
        )
    return low
