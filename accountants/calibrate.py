# SPDX-License-Identifier: Apache-2.0
"""From a budget to a parameter, for the Poisson-subsampled Gaussian with add-or-remove-one neighbours.

The law of this file: **a returned parameter has been priced**, and its price is within the budget. Each
search brackets the answer with the Renyi curve (milliseconds), whose answer is already valid for every
accountant that is never above it, and then narrows the bracket on the accountant asked for.
"""

import math
from collections.abc import Callable

from accountants.curve import Accountant, Curve, check_count, check_delta
from accountants.events import Event, Gaussian, PoissonSampled, Repeated
from accountants.nests import shown
from accountants.registry import accountant as named
from accountants.relations import ADD_REMOVE

_TOLERANCE = 0.002  # relative width of the final bracket
_LARGEST_NOISE = 1e7
_SMALLEST_RATE = 1e-12
_MOST_STEPS = 10**9


def epsilon(
    *, noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: str = "prv"
) -> float:
    """Bound the epsilon of `steps` steps at `delta` from above; `inf` without noise, 0 without steps.

    Raises:
        ValueError: a parameter out of range, or an unknown accountant.
    """
    check_count(steps)
    step = PoissonSampled(sampling_rate, Gaussian(noise_multiplier))
    return named(accountant).curve(Repeated(step, steps)).epsilon(delta)


def noise_multiplier(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int, accountant: str = "prv"
) -> float:
    """Find the smallest noise multiplier (noise std / sensitivity) that keeps `steps` steps within budget.

    Returns 0.0 when there is nothing to protect (no steps, rate 0, infinite epsilon).

    Raises:
        ValueError: the budget cannot be met, or a parameter is out of range.

    Guarantees:
        - the price of the result is at most `epsilon`.
        - the result is within 0.5 % of the smallest such value.
    """
    _check_budget(epsilon, delta)
    check_count(steps)
    PoissonSampled(sampling_rate, Gaussian(1.0))
    if steps == 0 or sampling_rate == 0 or math.isinf(epsilon):
        return 0.0

    def price(log_sigma: float, rule: Accountant) -> float:
        step = PoissonSampled(sampling_rate, Gaussian(math.exp(log_sigma)))
        return rule.curve(Repeated(step, steps)).epsilon(delta)

    # The logarithm of the noise multiplier falls with the price, hence the signs.
    found = _largest(
        lambda x, rule: price(-x, rule), epsilon, accountant, -math.log(_LARGEST_NOISE), math.inf
    )
    if found is None:
        raise ValueError(
            f"epsilon must be reachable at delta={delta:g} with a noise multiplier up to {_LARGEST_NOISE:g}; got "
            f"epsilon={epsilon:g} for {steps} steps at rate {sampling_rate:g}; raise epsilon or delta"
        )
    return math.exp(-found)


def sampling_rate(
    *, epsilon: float, delta: float, noise_multiplier: float, steps: int, accountant: str = "prv"
) -> float:
    """Find the largest Poisson sampling rate in (0, 1] that keeps `steps` steps within budget.

    Raises:
        ValueError: no rate above 1e-12 meets the budget, or a parameter is out of range.

    Guarantees:
        - the price of the result is at most `epsilon`.
        - the result is within 0.5 % of the largest such value.
    """
    _check_budget(epsilon, delta)
    check_count(steps)
    mechanism = Gaussian(noise_multiplier)

    def price(log_rate: float, rule: Accountant) -> float:
        step = PoissonSampled(min(1.0, math.exp(log_rate)), mechanism)
        return rule.curve(Repeated(step, steps)).epsilon(delta)

    found = _largest(price, epsilon, accountant, math.log(_SMALLEST_RATE), 0.0)
    if found is None:
        raise ValueError(
            f"epsilon must be reachable at delta={delta:g} with a sampling rate above {_SMALLEST_RATE:g}; got "
            f"epsilon={epsilon:g} for {steps} steps at noise multiplier {noise_multiplier:g}; add noise"
        )
    return min(1.0, math.exp(found))


def num_steps(
    *,
    event: Event,
    epsilon: float,
    delta: float,
    accountant: str = "prv",
    spent: Curve | None = None,
    relation: str = ADD_REMOVE,
) -> int:
    """Count how many runs of `event` fit within budget on top of `spent`; 0 if not one does.

    Args:
        event: one step (of an epoch-priced sampler: one epoch).
        epsilon: the budget, inclusive of `spent`.
        delta: the delta of the budget.
        accountant: the name of the accountant.
        spent: a curve of the same accountant and relation for what was released before.
        relation: which datasets are neighbours, one of `relations.RELATIONS`.

    Raises:
        ValueError: the event costs nothing or next to nothing, so that 10^9 steps fit.

    Guarantees:
        - the price of the result is at most `epsilon`, that of one step more is above it.
    """
    _check_budget(epsilon, delta)
    step = named(accountant, relation).curve(event)

    def price(count: int) -> float:
        return (step * count if spent is None else spent + step * count).epsilon(delta)

    low, at_low = 0, 0.0 if spent is None else spent.epsilon(delta)
    high, at_high = 1, price(1)
    if spent is None and accountant != "rdp" and at_high <= epsilon:
        fewest = num_steps(event=event, epsilon=epsilon, delta=delta, accountant="rdp", relation=relation)
        high, at_high = max(1, fewest), price(max(1, fewest))
    while at_high <= epsilon:
        if high >= _MOST_STEPS:
            raise ValueError(
                f"event must use up the budget; got {shown(event)}, free for {high} runs; check it"
            )
        low, at_low = high, at_high
        high = high + max(1, high // 8) if low and spent is None and accountant != "rdp" else 2 * high
        at_high = price(high)
    return _last_within(price, epsilon, (low, at_low), (high, at_high))


def _last_within(
    price: Callable[[int], float], budget: float, inside: tuple[int, float], outside: tuple[int, float]
) -> int:
    """Find the last count priced within budget: interpolation, and probes from the end that last moved."""
    (low, at_low), (high, at_high) = inside, outside
    probe, moved_low = False, True
    while high - low > 1:
        if probe:
            stride = max(1, (high - low) // 16)
            guess = low + stride if moved_low else high - stride
        elif math.isfinite(at_high) and at_high > at_low:
            guess = low + int((high - low) * (budget - at_low) / (at_high - at_low))
        else:
            guess = (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        value = price(guess)
        moved_low, probe = value <= budget, not probe
        if moved_low:
            low, at_low = guess, value
        else:
            high, at_high = guess, value
    return low


def _check_budget(epsilon: float, delta: float) -> None:
    check_delta(delta)
    if isinstance(epsilon, bool) or not (isinstance(epsilon, int | float) and epsilon > 0):
        raise ValueError(f"epsilon must be a number > 0; got {epsilon!r}; pass e.g. epsilon=2.0")
    if delta == 0:
        raise ValueError("delta must be above 0 for Gaussian noise; got 0; pass e.g. delta=1e-5")


def _largest(
    price: Callable[[float, Accountant], float], budget: float, name: str, floor: float, ceiling: float
) -> float | None:
    """Find the largest x in [floor, ceiling] with price(x) <= budget, to the tolerance; None if floor is too dear.

    `price` grows with x. The last x that was priced within the budget is returned.
    """
    rule, cheap = named(name), named("rdp")

    def gap(x: float, by: Accountant) -> float:
        value = price(x, by)
        return math.inf if math.isinf(value) else math.log(max(value, 1e-300) / budget)

    start = min(0.0, ceiling)
    low = _step(lambda x: gap(x, cheap), start, floor, ceiling)
    if low is None:
        return None
    if rule is not cheap and gap(low, rule) > 0:  # dearer than Renyi: "zcdp" under sampling
        low = _step(lambda x: gap(x, rule), start, floor, ceiling)
        if low is None:
            return None
    return _refine(lambda x: gap(x, rule), low, ceiling)


def _step(gap: Callable[[float], float], start: float, floor: float, ceiling: float) -> float | None:
    """Find by bisection the largest x, to 1e-3, with gap(x) <= 0 between floor and ceiling."""
    low, high = start, start
    while gap(low) > 0:
        if low <= floor:
            return None
        low, high = max(floor, 2 * low - start - 1), low
    if low == start:
        while gap(high) <= 0:
            if high >= ceiling or high > 700:
                return high
            low, high = high, min(ceiling, high + 1)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) <= 0 else (low, middle)
    return low


def _refine(gap: Callable[[float], float], low: float, ceiling: float) -> float:
    """Push low (gap <= 0) up to within the tolerance of the root: secant steps kept inside a bracket."""
    at_low, width = gap(low), 0.05
    high, at_high = low, at_low
    while at_high <= 0:
        if high >= ceiling:
            return ceiling
        low, at_low = high, at_high
        # the gap in the price tells about how far the root is; the slope is at least 1/2 or so
        high = min(ceiling, low + max(width, min(1.0, -1.2 * at_low)))
        at_high, width = gap(high), 2 * width
    for _ in range(60):
        if high - low <= _TOLERANCE:
            break
        share = at_low / (at_low - at_high) if math.isfinite(at_high) and at_low < 0 else 0.5
        share = min(max(share, 0.02), 0.98)
        guess = low + share * (high - low)
        # aim beside the root, so that the bracket closes from both sides
        guess += 0.4 * _TOLERANCE if guess - low < high - guess else -0.4 * _TOLERANCE
        guess = min(max(guess, low + 0.3 * _TOLERANCE), high - 0.3 * _TOLERANCE)
        at_guess = gap(guess)
        if at_guess <= 0:
            low, at_low = guess, at_guess
        else:
            high, at_high = guess, at_guess
    return low
