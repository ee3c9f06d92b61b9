# SPDX-License-Identifier: Apache-2.0
"""Privacy-loss distributions that are never below the truth, and within 0.1 % of it as a rule.

Each step is replaced by a law on a grid that dominates it (`accountants.dominating_pairs.connect_the_dots`); the laws are composed under an
exponential tilt with every error added to the answer (`accountants.privacy_loss.fft_composition`). Both directions of add-or-remove are
composed and the larger answer is kept: no conjecture about which one dominates is needed.

A coarse grid finds out where the answer lies and how steep delta is there; the mesh of the final grid is
chosen from it, so that the error in epsilon is `LOOSENESS` of it. Every grid gives a valid bound; where none that is affordable is tight, the Renyi bound is
taken if it is less, and `Bound.method` says so.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from accountants.curve import FIXED_SCHEDULE, Bound, rounded_up
from accountants.dominating_pairs.kinds import KINDS
from accountants.dominating_pairs.sampled_step import Step
from accountants.events import Event, Gaussian
from accountants.methods.closed_forms import Leaves, closed_delta, closed_epsilon, renyi_curve, total_mu
from accountants.methods.lazy_curve import LazyCurve, Pricing
from accountants.privacy_loss.direction import Direction, Steps
from accountants.relations import ADD_REMOVE, as_step

LOOSENESS = 1e-4
"""The relative error in epsilon that the mesh is chosen for."""
MAX_DISTINCT = 512
"""The most mechanisms composed as they are; above it they are rounded, pessimistically, to a geometric grid."""

_ROUGHLY = 1e-3  # the looseness for searches
_TINY = 3e-3  # the relative error in an epsilon so small that delta hardly depends on it
_COARSE = 0.02  # the relative error of the first grid
_FEW = 64  # the number of distinct mechanisms above which four times the looseness is accepted
_MOST_STEPS = 10**13  # beyond it the rounding errors of each step add up to all there is
_LARGE = 1e9  # where closed forms begin to lose digits
_TILT = 0.6  # the tilt, as a part of the slope of log delta


@dataclass(frozen=True, slots=True)
class PLD:
    """The tight accountant for a schedule fixed in advance: milliseconds to a second, within 0.1 %.

    Guarantees (of its curves):
        - never below the truth, in both directions of add-or-remove, and never above the Renyi bound.
        - `bound(delta).method` is "closed form", "pld" or "rdp".
    """

    name: str = "pld"
    adaptive: bool = False
    relation: str = ADD_REMOVE

    def curve(self, event: Event) -> LazyCurve:
        """Price `event`; raises `UnpricedEvent`, naming the leaf."""
        return LazyCurve.of(event, Pricing(pld_bound, pld_delta), self.relation)


@dataclass(frozen=True, slots=True)
class RoughPLD:
    """`PLD` on coarser grids, a few times faster and a little above it: for searches."""

    name: str = "pld"
    adaptive: bool = False
    relation: str = ADD_REMOVE

    def curve(self, event: Event) -> LazyCurve:
        """Price `event`; raises `UnpricedEvent`, naming the leaf."""
        return LazyCurve.of(event, _ROUGH, self.relation)


@lru_cache(maxsize=1024)
def pld_bound(items: Leaves, delta: float, looseness: float = LOOSENESS) -> Bound:
    """Return the bound at `delta` of merged leaves: by their closed form, on grids, or the Renyi one if it is less."""
    base = (FIXED_SCHEDULE,)
    closed = closed_epsilon(items, delta)
    if closed is not None and closed < _LARGE:
        return Bound(closed, delta, "closed form", base)
    safe = renyi_curve(items).epsilon(delta)
    if closed is not None:
        return Bound(min(closed, safe), delta, "closed form" if closed <= safe else "rdp", base)
    if not 0 < safe < math.inf:
        return Bound(safe, delta, "rdp", base)
    steps = _steps(items) if delta > 1e-280 else None
    found = math.inf if steps is None else rounded_up(_epsilon(steps, delta, looseness))
    return Bound(safe, delta, "rdp", base) if safe <= found else Bound(found, delta, "pld", base)


def _rough_bound(items: Leaves, delta: float) -> Bound:
    return pld_bound(items, delta, _ROUGHLY)


@lru_cache(maxsize=1024)
def pld_delta(items: Leaves, epsilon: float) -> float:
    """Return the delta proven at `epsilon` for merged leaves."""
    closed = closed_delta(items, epsilon)
    if closed is not None:
        return closed
    safe = renyi_curve(items).delta(epsilon)
    if safe < 1e-280 or math.isinf(epsilon):
        return safe
    steps = _steps(items)
    if steps is None:
        return safe
    found = _delta_of(steps, epsilon, safe, True, 0.0)
    return found if found >= safe else max(found, _delta_of(steps, epsilon, safe, False, found))


def _steps(items: Leaves) -> Steps | None:
    """Write the leaves as steps: all plain Gaussians as one, and not too many distinct ones.

    None for more steps than any grid is made for.
    """
    if sum(count for _, count in items) > _MOST_STEPS:
        return None
    plain = tuple(item for item in items if isinstance(item[0], Gaussian))
    sampled = {as_step(leaf): count for leaf, count in items if not isinstance(leaf, Gaussian)}
    ratio = 0.001
    steps = sampled
    while len(steps) > MAX_DISTINCT:
        steps = _on_geometric_grid(sampled, ratio)
        ratio *= 1.2
    mu = total_mu(plain)
    merged = ((Step(1 / mu * (1 - 1e-15), 1.0), 1),) if mu else ()
    return merged + tuple(sorted(steps.items(), key=lambda item: repr(item[0])))


def _on_geometric_grid(steps: dict[Step, int], ratio: float) -> dict[Step, int]:
    """Round noise multipliers down and rates up to powers of exp(ratio): more is leaked, never less."""
    rounded: dict[Step, int] = {}
    several = len({step.sampling_rate for step in steps}) > 1
    for step, count in steps.items():
        s, q = step.noise_multiplier, step.sampling_rate
        low = math.exp(ratio * math.floor(math.log(s) / ratio)) * (1 - 1e-12)
        # below 1: a sample of all records is another mechanism
        high = (
            min(1 - 1e-12, math.exp(ratio * math.ceil(math.log(q) / ratio)) * (1 + 1e-12)) if several else q
        )
        key = replace(step, noise_multiplier=low, sampling_rate=max(q, high))
        rounded[key] = rounded.get(key, 0) + count
    return rounded


def _epsilon(steps: Steps, delta: float, looseness: float = LOOSENESS) -> float:
    """Return the larger epsilon of the two directions."""
    found = _epsilon_of(steps, delta, True, 0.0, looseness)
    if math.isinf(found) or all(KINDS[step.pair].alike or step.sampling_rate == 1 for step, _ in steps):
        return found
    return max(found, _epsilon_of(steps, delta, False, found, looseness))


def _epsilon_of(steps: Steps, delta: float, removed: bool, known: float, looseness: float) -> float:
    """Bound epsilon in one direction; a result below `known`, the other direction's, need not be tight."""
    side = Direction.of(steps, removed, delta)
    if side is None:
        return math.inf
    guess, order = side.outlook.at_delta(delta, known)
    goal = looseness if len(steps) <= _FEW else max(looseness, 4 * LOOSENESS)
    aim, low, best, slope, kind, final = _COARSE, 0.0, math.inf, order, np.float64, False
    for _ in range(8):
        asked = side.mesh(max(aim * guess, (known - guess) / 2), slope)
        coarsest = max(asked, side.mesh(3 * guess, order))
        found = side.tail(asked, coarsest, _TILT * order, low, delta, kind)
        if found is None:
            break
        mesh, tail = found
        value = tail.epsilon(delta)
        best = min(best, value)
        if value <= known:
            break
        if known or math.isinf(value):
            (guess, order), known, aim = side.outlook.at_delta(delta), 0.0, aim / 4
            continue
        slope = tail.slope(value)
        if slope == 0:  # what is left lies beyond the window
            break
        guess, error, noise = value, side.error(mesh, slope), tail.noise_share(value) / slope
        allowed = goal * value if slope * value > 1 else min(goal / slope, max(goal, _TINY) * value)
        loud = noise > max(error, allowed / 2)
        fine = final and (mesh > 1.2 * asked or error <= 1.3 * allowed)
        if error + noise <= 1.5 * allowed or (kind is np.longdouble if loud else fine):
            break
        kind = np.longdouble if noise > allowed / 2 else kind
        low, aim, final = (0.9 * value if error < 0.05 * value else 0.0), allowed / value, True
    return best


def _delta_of(steps: Steps, epsilon: float, safe: float, removed: bool, known: float) -> float:
    """Bound delta at `epsilon` in one direction; `safe` is a bound already, below `known` it need not be tight."""
    best, near, kind = safe, safe, np.float64
    for _ in range(6):
        seen = _near(steps, epsilon, near, removed, known)
        if seen is None:
            break
        side, near, order = seen
        meshes = side.mesh(0.0005 / order, order), side.mesh(20 / order, order)
        found = side.tail(*meshes, _TILT * order, 0.99 * epsilon, near / 10, kind)
        if found is None:
            break
        tail = found[1]
        value = tail.delta(epsilon)
        best = min(best, value)
        if best <= known:
            break
        if kind is np.float64 and tail.noise_share(epsilon) > 0.01:
            kind = np.longdouble
        elif value < near / 100:
            near = max(value, 1e-280)
        else:
            break
    return best


def _near(
    steps: Steps, epsilon: float, near: float, removed: bool, known: float
) -> tuple[Direction, float, float] | None:
    """Look for delta at `epsilon` from `near` downwards; return one direction there, about delta, and its slope.

    Losses so rare that they do not matter near one delta do for a lesser one: it is approached by steps.
    """
    log_known = math.log(known) if known > 0 else -math.inf
    while True:
        side = Direction.of(steps, removed, near)
        if side is None:
            return None
        log_delta, order = side.outlook.at_epsilon(epsilon, log_known)
        guess = max(math.exp(max(log_delta, -640.0)), known, 1e-280)
        if guess >= 1e-3 * near:
            return side, min(guess, near), order
        near = max(guess, 1e-4 * near)


_ROUGH = Pricing(_rough_bound, pld_delta)
