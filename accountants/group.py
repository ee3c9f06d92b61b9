# SPDX-License-Identifier: Apache-2.0
"""What a bound for one record says about a group of them: a person with several records, say.

If a release is (e, d) private for one record, then it is (k e, d (1 + exp(e) + ... + exp((k-1) e))) private for k of
them, by going from D to D' record by record (Vadhan 2017, The Complexity of Differential Privacy, lemma 2.2); that
is below k exp((k-1) e) d. Every e gives a bound, the best one is searched. Some kinds of curves know better:

- Gaussians: k records move the sum by k at most, the noise multiplier is divided by k, exactly;
- Poisson samples, records there or not, or emptied: the pair of a group, of which each record is sampled by itself
  (`accountants.dominating_pairs.feedback_step`); both only where the curve keeps its mechanisms ("pld" and "prv");
- Renyi: rho(a) for groups of 2^c is at most 3^c rho(2^c a) (Mironov 2017, arXiv:1702.07476, proposition 2);
- rho-zCDP: k^2 rho (Bun, Steinke 2016, arXiv:1605.02065, proposition 1.9).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from accountants.curve import Bound, Curve, check_count, check_delta, check_epsilon, rounded_up
from accountants.dominating_pairs.feedback_step import MOST_RECORDS
from accountants.dominating_pairs.gaussian import smallest
from accountants.dominating_pairs.sampled_step import GROUP, Step
from accountants.events import Gaussian, PoissonSampled
from accountants.methods.lazy_curve import LazyCurve
from accountants.methods.rdp import ORDERS, RenyiCurve
from accountants.methods.zcdp import ConcentratedCurve
from accountants.relations import Pair, merged


@dataclass(frozen=True, slots=True)
class GroupCurve:
    """The bound that `curve`, for one record, gives for any `size` of them.

    Guarantees
    ----------
    Never below the truth for groups of at most `size` records, under the relation of `curve`, record by record
    (test_guarantee_group_is_never_below_the_exact_group). Composition is that of `curve`.
    """

    curve: Curve
    size: int

    def __add__(self, other: "GroupCurve", /) -> "GroupCurve":
        if other.size != self.size:
            raise ValueError(
                f"curves must be for groups of one size to be added; got {self.size} and {other.size}; group their sum"
            )
        return GroupCurve(self.curve + other.curve, self.size)

    def __mul__(self, count: int, /) -> "GroupCurve":
        check_count(count)
        return GroupCurve(self.curve * count, self.size)

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon >= 0 proven for the group at `delta`."""
        return self.bound(delta).epsilon

    def _generic_epsilon(self, delta: float) -> float:
        if math.isinf(self.curve.epsilon(delta)):
            return math.inf
        start = max(self.curve.epsilon(delta / self.size), 1e-9)
        each = smallest(lambda e: self._generic_delta(e) <= delta, start=start)
        return rounded_up(self.size * each)

    def delta(self, epsilon: float) -> float:
        """Return the smallest delta proven for the group at `epsilon`."""
        check_epsilon(epsilon)
        known = _known(self.curve, self.size)
        if isinstance(known, LazyCurve):
            return known.delta(epsilon)
        generic = self._generic_delta(epsilon / self.size * (1 - 1e-15))
        return min(1.0, generic, 1.0 if known is None else known.delta(epsilon))

    def _generic_delta(self, each: float) -> float:
        """Bound delta at `size` times the epsilon of one record, `each`."""
        one = self.curve.delta(each)
        if one == 0 or each * self.size > 700:
            return 0.0 if one == 0 else 1.0
        return one * math.fsum(math.exp(j * each) for j in range(self.size)) * (1 + 1e-12)

    def bound(self, delta: float) -> Bound:
        """Return `epsilon(delta)`, with the method and the assumptions of the curve that proved it."""
        check_delta(delta)
        known = _known(self.curve, self.size)
        if isinstance(known, LazyCurve):
            found = known.bound(delta)
        else:
            value = min(self._generic_epsilon(delta), math.inf if known is None else known.epsilon(delta))
            found = replace(self.curve.bound(delta), epsilon=value)
        return replace(found, method=f"{found.method}, group of {self.size}")


def group(curve: Curve, size: int) -> GroupCurve:
    """Bound what `curve`, proven for one record, says about groups of `size` records.

    Raises:
        ValueError: `size` is no integer >= 1.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be an integer >= 1; got {size!r}; pass the most records of one person")
    return GroupCurve(curve, size)


def _known(curve: Curve, size: int) -> Curve | None:
    rule = _RULES.get(type(curve))
    return None if rule is None else rule(curve, size)


def _renyi(curve: RenyiCurve, size: int) -> Curve | None:
    if curve.slip:
        return None
    doublings = math.ceil(math.log2(size))
    order = np.argsort(ORDERS)
    orders, values = ORDERS[order], curve.values[order]
    # The divergence grows with the order: take it from the next order of the grid.
    places = np.searchsorted(orders, ORDERS * 2.0**doublings * (1 - 1e-12))
    usable = places < len(orders)
    grown = values[np.minimum(places, len(orders) - 1)] * 3.0**doublings
    within = usable & (ORDERS >= 2)  # the proposition asks for 2^c times the order >= 2^(c+1)
    if size == 1:
        return curve
    return RenyiCurve(np.where(within, grown, np.inf), curve.relation)


def _lazy(curve: LazyCurve, size: int) -> Curve | None:
    if size == 1:
        return curve
    pairs = [_grouped(pair, size) for pair, _ in curve.leaves]
    if curve.slip or not pairs or None in pairs:
        return None
    counts: Counter[Pair] = Counter()
    for pair, (_, count) in zip(pairs, curve.leaves, strict=True):
        if pair is not None:
            counts[pair] += count
    return LazyCurve(merged(counts), curve.pricing, curve.relation, 0.0)


def _grouped(pair: Pair, size: int) -> Pair | None:
    """The pair that dominates a step for groups of `size` records; None where none is known."""
    match pair:
        case Gaussian(noise_multiplier=s):
            return Gaussian(s / size * (1 - 1e-15))
        case PoissonSampled(sampling_rate=q, event=Gaussian(noise_multiplier=s)) if size <= MOST_RECORDS:
            return Step(s, q, GROUP, size=size)
    return None


def _concentrated(curve: ConcentratedCurve, size: int) -> Curve | None:
    if curve.slip:
        return None
    return ConcentratedCurve(rounded_up(curve.rho * size * size), curve.relation)


_RULES: Mapping[type, Callable[[Any, int], Curve | None]] = {
    RenyiCurve: _renyi,
    LazyCurve: _lazy,
    ConcentratedCurve: _concentrated,
}
