# SPDX-License-Identifier: Apache-2.0
"""Privacy-loss distributions that are never below the truth, and within 0.1 % of it as a rule.

Each step is replaced by a law on a grid that dominates it (`accountants.dots`); the laws are composed under an
exponential tilt with every error added to the answer (`accountants.tilt`). Both directions of add-or-remove are
composed and the larger answer is kept: no conjecture about which one dominates is needed.

A coarse grid finds out where the answer lies and how steep delta is there; the mesh of the final grid is
chosen from it, so that the error in epsilon is `LOOSENESS` of it. Every grid gives a valid bound; where none that is affordable is tight, the Renyi bound is
taken if it is less, and `Bound.method` says so.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from accountants.closed import Leaves, closed_delta, closed_epsilon, renyi_curve, total_mu
from accountants.curve import FIXED_SCHEDULE, Bound, rounded_up
from accountants.direction import Direction, Steps
from accountants.events import Event, Gaussian
from accountants.lazy import LazyCurve, Pricing
from accountants.loss import Step
from accountants.pairs import KINDS
from accountants.relations import ADD_REMOVE, as_step

LOOSENESS = 1e-4
"""The relative error in epsilon that the mesh is chosen for."""
MAX_DISTINCT = 512
"""The most mechanisms composed as they are; above it they are rounded, pessimistically, to a geometric grid."""

_COARSE = 0.02  # the relative error of the first grid
_FEW = 64  # the number of distinct mechanisms above which four times the looseness is accepted
_TILT = 0.6  # the tilt, as a part of the slope of log delta


@dataclass(frozen=True, slots=True)
class PLD:
    """The tight accountant for a schedule fixed in advance: milliseconds to a second, within 0.1 %.

    Guarantees (of its curves):
        - never below the truth, in both directions of add-or-remove.
        - `bound(delta).method` is "closed form", "pld" or "rdp".
    """

    name: str = "pld"
    adaptive: bool = False
    relation: str = ADD_REMOVE

    def curve(self, event: Event) -> LazyCurve:
        """Price `event`; raises `UnpricedEvent`, naming the leaf."""
        return LazyCurve.of(event, Pricing(_bound, _delta), self.relation)


@lru_cache(maxsize=1024)
def _bound(items: Leaves, delta: float) -> Bound:
    base = (FIXED_SCHEDULE,)
    closed = closed_epsilon(items, delta)
    if closed is not None:
        return Bound(closed, delta, "closed form", base)
    found, sound = (math.inf, False) if delta < 1e-280 else _epsilon(_steps(items), delta)
    if not sound:
        safe = renyi_curve(items).epsilon(delta)
        if safe <= found:
            return Bound(safe, delta, "rdp", base)
    return Bound(rounded_up(found), delta, "pld", base)


@lru_cache(maxsize=1024)
def _delta(items: Leaves, epsilon: float) -> float:
    closed = closed_delta(items, epsilon)
    if closed is not None:
        return closed
    safe = renyi_curve(items).delta(epsilon)
    if safe < 1e-280 or math.isinf(epsilon):
        return safe
    steps = _steps(items)
    found = _delta_of(steps, epsilon, safe, True, 0.0)
    return found if found >= safe else max(found, _delta_of(steps, epsilon, safe, False, found))


def _steps(items: Leaves) -> Steps:
    """Write the leaves as steps: all plain Gaussians as one, and not too many distinct ones."""
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


def _epsilon(steps: Steps, delta: float) -> tuple[float, bool]:
    """Return the larger epsilon of the two directions, and whether it is as tight as promised."""
    found, sound = _epsilon_of(steps, delta, True, 0.0)
    if math.isinf(found):
        return found, sound
    if all(KINDS[step.pair].alike or step.sampling_rate == 1 for step, _ in steps):
        return found, sound  # both directions are alike
    other, also = _epsilon_of(steps, delta, False, found)
    return max(found, other), sound and also


def _epsilon_of(steps: Steps, delta: float, removed: bool, known: float) -> tuple[float, bool]:
    """Bound epsilon in one direction; a result below `known`, the other direction's, need not be tight."""
    side = Direction.of(steps, removed, delta)
    if side is None:
        return math.inf, False
    guess, order = side.outlook.at_delta(delta, known)
    goal = LOOSENESS if len(steps) <= _FEW else 4 * LOOSENESS
    aim, low, best, loose, slope, kind = _COARSE, 0.0, math.inf, math.inf, order, np.float64
    for _ in range(8):
        asked = side.mesh(max(aim * guess, (known - guess) / 2), slope)
        mesh, tail = side.tail(asked, _TILT * order, low, delta, kind)
        value = tail.epsilon(delta)
        best = min(best, value)
        if value <= known:
            return best, True
        if known or math.isinf(value):
            (guess, order), known, aim = side.outlook.at_delta(delta), 0.0, aim / 4
            continue
        slope = tail.slope(value)
        if slope == 0:  # what is left lies beyond the window
            return best, False
        guess, error, noise = value, side.error(mesh, slope), tail.noise_share(value) / slope
        loose = (error + noise) / value
        finished = kind is np.longdouble if noise > error else aim <= goal and mesh > 1.2 * asked
        if loose <= 1.5 * goal or finished:
            break
        kind = np.longdouble if noise > error else kind
        low, aim = (0.9 * value if error < 0.05 * value else 0.0), goal
    return best, loose < 0.005


def _delta_of(steps: Steps, epsilon: float, safe: float, removed: bool, known: float) -> float:
    """Bound delta at `epsilon` in one direction; `safe` is a bound already, below `known` it need not be tight."""
    log_known = math.log(known) if known > 0 else -math.inf
    side = Direction.of(steps, removed, safe)
    if side is None:
        return safe
    log_delta, order = side.outlook.at_epsilon(epsilon, log_known)
    near, kind = max(min(safe, math.exp(max(log_delta, -640.0))), 1e-280), np.float64
    best = safe
    for _ in range(4):
        side = Direction.of(steps, removed, near)
        if side is None:
            break
        _, tail = side.tail(side.mesh(0.002 / order, order), _TILT * order, 0.99 * epsilon, near / 10, kind)
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
