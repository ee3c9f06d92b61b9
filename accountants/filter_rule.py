# SPDX-License-Identifier: Apache-2.0
"""The rule of a filter: what a charge costs, when the next one fits, and what is guaranteed if all fitted.

The rules, and why they hold, stand in `accountants.filter`. A rule is plain numbers: a ledger keeps its `config` and
makes it again, under the relation of its header.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from accountants.curve import Bound, check_delta
from accountants.dominating_pairs.gaussian import gaussian_delta, gaussian_epsilon, smallest
from accountants.events import Event, Gaussian, UnpricedEvent
from accountants.methods.rdp import ORDERS, RDP
from accountants.nests import shown
from accountants.relations import RELATIONS, check_relation, priced

Array = NDArray[np.float64]

ADAPTIVE_SCHEDULE = (
    "each release may depend on the released outputs before it, and on nothing else that is private"
)
ONE, SOME, EVERY, GAUSSIAN = "one order", "some order", "every order", "gaussian"

_ROUNDING = 1e-12  # relative, on top of sums that are rounded up
_LARGEST_EPSILON = 1e6
_SMALLEST_DELTA = 1e-300


class BudgetExhausted(RuntimeError):
    """The next release would exceed the budget; it was neither charged nor made."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A filter's arithmetic: `cost` of a charge at each order, the `limits`, and whether `every` order must hold.

    `config` is what makes it again (`declared_rule`), `epsilons` what it guarantees at a delta other than its own.
    """

    epsilon: float
    delta: float
    relation: str
    cost: Callable[[Event], Array]
    limits: Array
    every: bool
    config: Mapping[str, object]
    method: str
    epsilons: Callable[[float], float]

    def holds(self, totals: Array) -> bool:
        """Tell whether charges of these total costs are within the limits."""
        within = totals * (1 + _ROUNDING) <= self.limits
        return bool(within.all() if self.every else within.any())

    def kept(self, events: Event) -> bool:
        """Tell whether charges that were accepted one by one can have been these."""
        return self.holds(self.cost(events) * (1 - 1e-9))  # sums in another order round otherwise

    def left(self, totals: Array) -> float:
        """Return the part of the budget that is left, in [0, 1]."""
        parts = 1 - totals / self.limits
        return max(0.0, float(parts.min() if self.every else parts.max()))

    def bound(self, delta: float | None = None) -> Bound:
        """Return what is guaranteed if all charges fitted, however much of the budget they used.

        At another `delta` than the filter's own it is what the rule proves there (`accountants.filter`).
        """
        at = self.delta if delta is None else delta
        check_delta(at)
        epsilon = self.epsilon if at == self.delta else self.epsilons(at)
        if at > self.delta:
            epsilon = min(epsilon, self.epsilon)
        return Bound(epsilon, at, self.method, (RELATIONS[self.relation], ADAPTIVE_SCHEDULE))


def renyi_rule(
    epsilon: float, delta: float, weights: Mapping[float, float], name: str, relation: str
) -> Rule:
    """Make the rule of Renyi orders called `name`: `ONE`, `SOME` or `EVERY` of the orders must hold."""
    epsilon, delta = check_budget(epsilon, delta)
    check_relation(relation)
    shares = _shares(weights, disjoint=name != EVERY)
    orders, every = np.array(list(shares)), name == EVERY
    limits = renyi_limits(orders, epsilon, delta * np.array(list(shares.values())))
    if not (limits > 0).any() or (every and not (limits > 0).all()):
        raise ValueError(
            f"orders must be affordable at epsilon={epsilon:g}, delta={delta:g}; got {list(shares)}; raise the orders"
        )
    places = np.array([int(np.flatnonzero(order == ORDERS)[0]) for order in orders])
    budgets = np.maximum(limits, 1e-300)
    listed = ", ".join(f"{order:g}" for order in orders)
    return Rule(
        epsilon,
        delta,
        relation,
        lambda event: renyi_divergences(event, relation)[places],
        budgets,
        every,
        {"epsilon": epsilon, "delta": delta, "rule": name, "orders": list(shares), "weights": list(shares.values())},
        f"renyi filter, {name} of {listed}",
        lambda at: _renyi_epsilon(orders, budgets, every, at),
    )  # fmt: skip


def gaussian_rule(epsilon: float, delta: float, relation: str) -> Rule:
    """Make the rule of Gaussians on full batches or whole epochs."""
    epsilon, delta = check_budget(epsilon, delta)
    check_relation(relation)
    mu = _largest_mu(epsilon, delta)
    return Rule(
        epsilon,
        delta,
        relation,
        lambda event: _squared_mu(event, relation),
        np.array([mu * mu]),
        True,
        {"epsilon": epsilon, "delta": delta, "rule": GAUSSIAN},
        "gaussian filter",
        lambda at: gaussian_epsilon(mu, at),
    )


def declared_rule(configurations: Iterable[Mapping[str, object]], relation: str) -> Rule | None:
    """Make the rule that a ledger's attempts declare under "filter"; None where none does.

    Raises:
        ValueError: what is declared is no rule that is known here, or there are two.
    """
    declared = [config["filter"] for config in configurations if "filter" in config]
    if not declared:
        return None
    told = declared[0]
    try:
        if not isinstance(told, Mapping) or any(other != told for other in declared):
            raise ValueError("not one filter")
        if told["rule"] == GAUSSIAN:
            return gaussian_rule(told["epsilon"], told["delta"], relation)
        if told["rule"] not in (ONE, SOME, EVERY):
            raise ValueError(f"rule {told['rule']!r}")
        weights = dict(zip(told["orders"], told["weights"], strict=True))
        return renyi_rule(told["epsilon"], told["delta"], weights, told["rule"], relation)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the filter that a ledger declares must be one that is known here; got {told!r} ({error}); use the version "
            "that wrote it, or a ledger of its own"
        ) from error


def refuse_late(num_charges: int) -> None:
    """Raise ValueError where a filter is declared after charges: it says nothing about them."""
    if num_charges:
        raise ValueError(
            f"a filter must be declared before the first charge; got a ledger with {num_charges} charges; "
            "its order was to be fixed before the data were seen: use a fixed schedule"
        )


def renyi_limits(orders: Array, epsilon: float, delta: float | Array) -> Array:
    """Compute the budget B(a, delta) of each order, rounded down."""
    a = orders
    limits = epsilon + (np.log(delta) + np.log(a)) / (a - 1) - np.log1p(-1 / a)
    return limits - _ROUNDING * (1 + epsilon - np.log(np.min(delta)) / (a - 1))


def renyi_divergences(event: Event, relation: str) -> Array:
    """Compute the Renyi divergences of `event`; a slip in delta has no place in a Renyi budget."""
    curve = RDP(relation=relation).curve(event)
    if not curve.slip:
        return curve.values
    raise _slips(event, curve.slip)


def check_budget(epsilon: object, delta: object) -> tuple[float, float]:
    """Return a budget as floats, or refuse one that is no promise."""
    e, d = _real(epsilon), _real(delta)
    if not 0 < e <= _LARGEST_EPSILON:
        raise ValueError(
            f"epsilon must be a finite number > 0; got {epsilon!r}; pass e.g. epsilon=2.0 (above {_LARGEST_EPSILON:g} "
            "nobody is protected)"
        )
    if not _SMALLEST_DELTA <= d < 0.5:
        raise ValueError(
            f"delta must be a number in (0, 1), from {_SMALLEST_DELTA:g} to below one half; got {delta!r}; pass e.g. "
            "delta=1e-5, well below 1 / number of records"
        )
    return e, d


def _real(value: object) -> float:
    """The number as a float; NaN for what is no real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _shares(weights: Mapping[float, float], *, disjoint: bool) -> dict[float, float]:
    """Check orders and weights: the weights in the order of the orders; `disjoint` ones add up to 1 at most."""
    shares: dict[float, float] = {}
    if isinstance(weights, Mapping):
        shares = dict(sorted((_real(order), _real(weight)) for order, weight in weights.items()))
    if not shares or any(a not in ORDERS or not _SMALLEST_DELTA <= w < math.inf for a, w in shares.items()):
        raise ValueError(
            f"orders must be among rdp.ORDERS with weights > 0; got {weights!r}; use choose_order()"
        )
    if not disjoint:
        return shares
    total = sum(Fraction(share) for share in shares.values())
    if total > 1 + len(shares) * Fraction(1, 2**53):  # 1/3 + 1/3 + 1/3 and the like may be rounded up
        raise ValueError(
            f"weights must add up to at most 1; got {float(total):.17g}: the least epsilon over several orders at "
            "full delta is no bound for adaptive choices; divide the weights by their sum"
        )
    if total <= 1:
        return shares
    return {order: math.nextafter(float(share / total), 0.0) for order, share in shares.items()}


def _renyi_epsilon(orders: Array, budgets: Array, every: bool, delta: float) -> float:
    """Compute what budgets at several orders prove at `delta`: all of them hold, or each transcript has one."""
    if delta == 0:
        return math.inf
    constants = np.log1p(-1 / orders) + budgets

    def proven(epsilon: float) -> bool:
        logs = (orders - 1) * (constants - epsilon) - np.log(orders)
        logs += _ROUNDING * (1 + (orders - 1) * (np.abs(constants) + epsilon))
        return bool((logs.min() if every else np.logaddexp.reduce(logs)) <= math.log(delta))

    return smallest(proven, start=1.0)


def _squared_mu(event: Event, relation: str) -> Array:
    pairs, slip = priced(event, relation)
    if slip:
        raise _slips(event, slip)
    parts = []
    for leaf, count in pairs:
        if not isinstance(leaf, Gaussian):
            raise ValueError(
                f"a gaussian filter must be fed full-batch Gaussians; got {leaf!r}; use Filter.at_order for samples"
            )
        parts.append(count / leaf.noise_multiplier / leaf.noise_multiplier)
    return np.array([math.fsum(parts)])


def _slips(event: Event, slip: float) -> UnpricedEvent:
    return UnpricedEvent(
        f"a filter must be fed mechanisms with a Renyi price; got {shown(event)}, which costs delta {slip:.3g} besides; "
        "sample by Poisson without a largest batch, or fix the schedule"
    )


def _largest_mu(epsilon: float, delta: float) -> float:
    low, high = 0.0, 1.0
    while gaussian_delta(high, epsilon) <= delta:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, epsilon) <= delta else (low, middle)
    return low
