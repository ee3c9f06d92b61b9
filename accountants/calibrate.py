# SPDX-License-Identifier: Apache-2.0
"""From a budget to a parameter: the noise, the sampling rate or the number of steps that it affords.

The law of this file: **a returned parameter has been priced**, and its price is within the budget. Each search begins
where the Renyi curve (milliseconds) meets the budget, whose answer is valid for every accountant that is never above it,
and goes on from there with the accountant asked for.
"""

import math
from collections.abc import Callable

from accountants.curve import Accountant, Curve, check_count, check_delta
from accountants.events import Composed, Event, Gaussian, PoissonSampled, Repeated
from accountants.nests import shown
from accountants.registry import DEFAULT, rough
from accountants.registry import accountant as named
from accountants.relations import ADD_REMOVE
from accountants.search import last, least

LEAST_NOISE, MOST_NOISE = 1e-6, 1e12
"""The noise multipliers looked at: below, hardly anything is noise; above, hardly anything is not."""
_WIDTH = 0.002  # relative width of the final bracket
_SMALLEST_RATE = 1e-12
_MOST_STEPS = 10**18


def epsilon(
    *, noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: str = DEFAULT
) -> float:
    """Bound the epsilon of `steps` steps at `delta` from above; `inf` without noise, 0 without steps.

    Raises:
        ValueError: a parameter out of range, or an unknown accountant.
    """
    check_count(steps)
    step = PoissonSampled(sampling_rate, Gaussian(noise_multiplier))
    return named(accountant).curve(Repeated(step, steps)).epsilon(delta)


def noise_multiplier(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int, accountant: str = DEFAULT
) -> float:
    """Find the smallest noise multiplier (noise std / sensitivity) that keeps `steps` steps within budget.

    Returns 0.0 when there is nothing to protect (no steps, rate 0, infinite epsilon).

    Raises:
        ValueError: the budget cannot be met, or is met without noise, or a parameter is out of range.

    Guarantees:
        - the price of the result is at most `epsilon`.
        - the result is within 0.5 % of the smallest such value.
    """
    _check_budget(epsilon, delta)
    check_count(steps)
    PoissonSampled(sampling_rate, Gaussian(1.0))
    if steps == 0 or sampling_rate == 0 or math.isinf(epsilon):
        return 0.0
    what = f"{steps} steps at rate {sampling_rate:g}"
    found = least_noise(
        lambda noise: Repeated(PoissonSampled(sampling_rate, Gaussian(noise)), steps),
        epsilon=epsilon,
        delta=delta,
        accountant=accountant,
    )
    if found is None:
        raise ValueError(
            f"epsilon must be reachable at delta={delta:g} with a noise multiplier up to {MOST_NOISE:g}; got "
            f"epsilon={epsilon:g} for {what}; raise epsilon or delta"
        )
    if found <= LEAST_NOISE:
        raise ValueError(
            f"a budget must ask for noise; got epsilon={epsilon:g} at delta={delta:g} for {what}, which hardly any noise "
            f"meets: a record takes part at all with probability {_part(sampling_rate, steps):.3g}; choose delta below "
            "1 / number of records, or a smaller epsilon"
        )
    return found


def _part(rate: float, steps: int) -> float:
    return 1.0 if rate == 1 else -math.expm1(steps * math.log1p(-rate))


def least_noise(
    event: Callable[[float], Event],
    *,
    epsilon: float,
    delta: float,
    accountant: str = DEFAULT,
    relation: str = ADD_REMOVE,
    spent: Event | None = None,
) -> float | None:
    """Find the smallest noise multiplier from `LEAST_NOISE` to `MOST_NOISE` that keeps a run within budget; None if none does.

    Args:
        event: everything that the run releases with a given noise multiplier; its price falls with it.
        epsilon: the budget, inclusive of `spent`.
        delta: the delta of the budget.
        accountant: the name of the accountant.
        relation: which datasets are neighbours, one of `relations.RELATIONS`.
        spent: what was released before.

    Guarantees
    ----------
    The result has been priced, and its price is within the budget (test_guarantee_the_least_noise_was_priced). It
    is within 0.5 % of the smallest such value.
    """
    _check_budget(epsilon, delta)
    before = () if spent is None else (spent,)

    def price(rule: Accountant) -> Callable[[float], float]:
        return lambda noise: rule.curve(Composed((*before, event(noise)))).epsilon(delta)

    prices = [price(rule) for rule in _rules(accountant, relation)]
    return least(prices, epsilon, start=1.0, low=LEAST_NOISE, high=MOST_NOISE, width=_WIDTH)


def _rules(name: str, relation: str) -> tuple[Accountant, ...]:
    """The accountants that a search asks one after the other, from the cheapest to the one called `name`."""
    return tuple(dict.fromkeys((named("rdp", relation), rough(name, relation), named(name, relation))))


def sampling_rate(
    *, epsilon: float, delta: float, noise_multiplier: float, steps: int, accountant: str = DEFAULT
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

    def price(rule: Accountant) -> Callable[[float], float]:
        return lambda spacing: rule.curve(
            Repeated(PoissonSampled(min(1.0, 1 / spacing), mechanism), steps)
        ).epsilon(delta)

    prices = [price(rule) for rule in _rules(accountant, ADD_REMOVE)]
    found = least(prices, epsilon, start=100.0, low=1.0, high=1 / _SMALLEST_RATE, width=_WIDTH)
    if found is None:
        raise ValueError(
            f"epsilon must be reachable at delta={delta:g} with a sampling rate above {_SMALLEST_RATE:g}; got "
            f"epsilon={epsilon:g} for {steps} steps at noise multiplier {noise_multiplier:g}; add noise"
        )
    return min(1.0, 1 / found)


def num_steps(
    *,
    event: Event,
    epsilon: float,
    delta: float,
    accountant: str = DEFAULT,
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
        ValueError: the event costs nothing or next to nothing, so that 10^18 runs fit.

    Guarantees:
        - the price of the result is at most `epsilon`, that of one step more is above it.
    """
    _check_budget(epsilon, delta)
    before = named(accountant, relation).curve(Composed(())) if spent is None else spent

    def price(rule: Accountant) -> Callable[[int], float]:
        step = rule.curve(event)
        if rule is named(accountant, relation):
            return lambda count: (before + step * count).epsilon(delta)
        return lambda count: (step * count).epsilon(delta)

    prices = [price(rule) for rule in _rules(accountant, relation)]
    found = last(prices, epsilon, start=1, most=_MOST_STEPS)
    if found is None:
        raise ValueError(
            f"event must use up the budget; got {shown(event)}, of which 10^18 runs fit within epsilon {epsilon:g} at delta "
            f"{delta:g}; check its noise and its rate, or give a smaller budget"
        )
    return found


def num_charges(
    whole: Callable[[int], Event],
    *,
    epsilon: float,
    delta: float,
    accountant: str = DEFAULT,
    relation: str = ADD_REMOVE,
    spent: Event | None = None,
    most: int = 1 << 24,
) -> int:
    """Count how many charges of a run fit within budget on top of `spent`, where they cost differently; `most` at most.

    `whole` gives the event of the first so many charges. Guarantees: as `num_steps`.
    """
    _check_budget(epsilon, delta)
    before = () if spent is None else (spent,)

    def price(rule: Accountant) -> Callable[[int], float]:
        return lambda count: rule.curve(Composed((*before, whole(count)))).epsilon(delta)

    found = last([price(rule) for rule in _rules(accountant, relation)], epsilon, start=1, most=most)
    return most if found is None else found


def _check_budget(epsilon: float, delta: float) -> None:
    check_delta(delta)
    if not (isinstance(epsilon, int | float) and epsilon > 0):
        raise ValueError(f"epsilon must be a number > 0; got {epsilon!r}; pass e.g. epsilon=2.0")
    if delta == 0:
        raise ValueError("delta must be above 0 for Gaussian noise; got 0; pass e.g. delta=1e-5")
