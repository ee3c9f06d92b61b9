# SPDX-License-Identifier: Apache-2.0
"""How far an upper bound is from the truth, at most: an epsilon that no proof can go below.

The counterpart of `accountants.dominating_pairs.connect_the_dots`. The curve H of a step is convex in exp(e); here its chords on the grid are
lowered until they lie below it. Between two grid points H stays above its tangents at both, hence no more below
the chord than width * (difference of their slopes) / 4. What remains is the curve of a pair of (sub-probability)
laws on the grid which the step dominates, and so do the compositions: delta(e) of a composition is a positive
mixture of values of the last step's curve. The error in epsilon is of second order in the mesh, as above.

Mass that comes into the window of the Fourier transform from outside of it is bounded by Chernoff and taken off;
rounding errors are taken off as in `accountants.privacy_loss.fft_composition`.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from accountants.curve import check_delta
from accountants.dominating_pairs.connect_the_dots import gaussian, inner, rounded
from accountants.dominating_pairs.grid_law import FARTHEST, UNIT, Law
from accountants.dominating_pairs.sampled_step import Step
from accountants.events import Event, Gaussian, NonPrivate, PoissonSampled, UnpricedEvent
from accountants.methods.closed_forms import closed_epsilon
from accountants.methods.pld import PLD
from accountants.nests import leaves
from accountants.privacy_loss.direction import MAX_POINTS, MAX_WORK, Direction, Steps, few_digits
from accountants.privacy_loss.fft_composition import Tail, Window, log_moment, transformed
from accountants.privacy_loss.window import ORDERS, Outlook, fast_size
from accountants.relations import ADD_REMOVE, as_step, extreme, priced

Array = NDArray[np.float64]

ENOUGH = 1e-3
"""The relative distance from the upper bound at which finer grids are no longer tried."""

_SMALL = 1e-6  # the part of delta that may come in from outside of the window
_TILT = 0.6
_TANGENTS = 24
_MOST_STEPS = 10**12
_TRIALS = ((0.97, 2e-4), (0.9, 5e-5), (0.9, 1e-5), (0.5, 2e-6), (0.0, 5e-7))
"""The least epsilon looked for and the error the mesh is chosen for, as parts of the upper bound."""


def lower_epsilon(event: Event, delta: float) -> float:
    """Return an epsilon that `event` is not below at `delta`: for some pair of neighbours its privacy is no better.

    Raises:
        UnpricedEvent: no price is known; the message names the leaf.

    Guarantees:
        - never above the true epsilon of the worst case over all mechanisms that `event` describes.
        - 0.0 where nothing better is affordable.
    """
    check_delta(delta)
    for leaf, _ in leaves(event):
        # the other prices are bounds from above only
        if type(leaf) not in (Gaussian, PoissonSampled, NonPrivate):
            raise UnpricedEvent(
                f"a lower bound needs a price that is attained; got {leaf!r}; ask for Poisson samples or full batches"
            )
        if extreme(leaf):
            return 0.0
    items = priced(event, ADD_REMOVE).pairs
    if any(isinstance(pair, NonPrivate) for pair, _ in items):
        return math.inf
    exact = closed_epsilon(items, delta)
    if exact is not None:
        # of larger ones some digits are lost
        return exact * (1 - 1e-9) if exact < 1e6 else 0.0
    if sum(count for _, count in items) > _MOST_STEPS:
        return 0.0
    steps = tuple((as_step(leaf), count) for leaf, count in items)
    upper = PLD().curve(event).epsilon(delta)  # it steers, it proves nothing
    found = _one_direction(steps, True, delta, upper)
    if found < 0.9 * upper:
        found = max(found, _one_direction(steps, False, delta, upper))
    return found * (1 - 1e-10)


def _one_direction(steps: Steps, removed: bool, delta: float, upper: float) -> float:
    side = Direction.of(steps, removed, delta) if delta > 1e-280 else None
    if side is None or not 0 < upper < math.inf:
        return 0.0
    _, order = side.outlook.at_delta(delta)
    found = 0.0
    for share, aim in _TRIALS:
        value = _on_grid(side, side.mesh(aim * upper, order), _TILT * order, share * upper, delta)
        if value < found or value > (1 - ENOUGH) * upper:
            return max(found, value)
        found = value
    return found


def _on_grid(side: Direction, mesh: float, tilt: float, low: float, delta: float) -> float:
    """Return the lower bound of one grid, 0 where it is below `low`."""
    log_mass = math.log(_SMALL * delta) + tilt * low
    widest = max(high - down for down, high in side.ends)
    most = min(MAX_POINTS, MAX_WORK // len(side.steps))
    while True:
        window, orders = _window(side.outlook, mesh, tilt, log_mass)
        if max(window.size, widest / mesh) <= most:
            break
        mesh = few_digits(1.05 * mesh * max(window.size, widest / mesh) / most)
        if mesh > 0.7:
            return 0.0
    laws = tuple(
        (lowered(step, side.removed, mesh, ends), count)
        for (step, count), ends in zip(side.steps, side.ends, strict=True)
    )
    tail, strayed = _tail(laws, window, orders, low)
    value = tail.epsilon(delta + strayed)
    nudge = 1e-9
    while low <= value < math.inf and tail.delta(value) < (delta + strayed) * (1 + 2e-12):
        value, nudge = value * (1 - nudge) - 1e-300, min(0.5, 2 * nudge)
    return value if low <= value < math.inf else 0.0


def _window(
    outlook: Outlook, mesh: float, tilt: float, log_mass: float
) -> tuple[Window, tuple[float, float]]:
    """Choose the window that keeps all but exp(log_mass) of the tilted law, and the orders that prove it."""
    near = np.abs(ORDERS) * mesh < 0.7
    psi = outlook.psi + outlook.steps * np.maximum(ORDERS * (ORDERS + 1), 0) * mesh * mesh / 12
    with np.errstate(divide="ignore", invalid="ignore"):
        right = np.where(near & (ORDERS > tilt), (psi - log_mass) / (ORDERS - tilt), np.inf)
        left = np.where(near & (ORDERS < tilt), (log_mass - psi) / (tilt - ORDERS), -np.inf)
    above, below = int(np.nanargmin(right)), int(np.nanargmax(left))
    if not math.isfinite(right[above] - left[below]):
        return Window(mesh, 0, MAX_POINTS * 2, tilt, 0.0), (0.0, 0.0)
    first = math.floor(left[below] / mesh) - 2
    size = fast_size(math.ceil(right[above] / mesh) + 3 - first)
    return Window(mesh, first, size, tilt, float(ORDERS[above])), (float(ORDERS[below]), float(ORDERS[above]))


def _tail(
    laws: tuple[tuple[Law, int], ...], window: Window, orders: tuple[float, float], low: float
) -> tuple[Tail, float]:
    """Compose: the masses above `low` from below, and what may have strayed into them, as a part of delta."""
    mesh, size, theta = window.mesh, window.size, window.tilt
    moment, masses, error = transformed(laws, window, np.float64)
    indices = np.arange(max(window.first, math.floor(low / mesh), 0), window.first + size)
    exponents = moment - theta * mesh * indices
    logs = [abs(moment), *(theta * mesh * max(-law.first, law.first + len(law.masses)) for law, _ in laws)]
    total = sum(count for _, count in laws)
    # every mass was inflated in tilting it, by 4 units for each digit of its exponent at most
    inflation = 32 * UNIT * (4 + total) * (4 + 740 + 2 * max(logs))
    scale = np.exp(np.minimum(exponents, 600.0)) * (1 - inflation - 16 * UNIT * (4 + np.abs(exponents)))
    kept = np.maximum(masses[indices % size] - error, 0.0) * np.maximum(scale, 0.0)
    ends = (window.first * mesh, (window.first + size) * mesh)
    strayed = 0.0
    for order, end in zip(orders, ends, strict=True):
        whole = sum(count * log_moment(law, mesh, order) for law, count in laws)
        log_part = whole + (theta - order) * end - theta * low
        strayed += math.exp(min(log_part, 0.0) + 1e-6)
    return Tail(mesh * indices.astype(np.float64), kept, np.zeros(len(kept)), 0.0), strayed


def lowered(step: Step, removed: bool, mesh: float, ends: tuple[float, float]) -> Law:
    """Discretise one step so that its curve lies nowhere below that of the result, which may lack some mass."""
    below, above = max(1, math.ceil(-ends[0] / mesh)), max(1, math.ceil(ends[1] / mesh))
    up, down = mesh * np.arange(above + 1.0), mesh * np.arange(-below, 1.0)
    curve, excess = _curve(step, removed, up), _excess(step, removed, down)
    drop = _drops(step, removed, np.append(down, up[1:]))
    known = (
        _tangents(step, np.append(down, up[1:])[: min(_TANGENTS, below + above)]) if removed else np.zeros(0)
    )
    # between two points the larger of the drops beside them; none where tangents take their place
    drop[: max(0, len(known) - 1)] = 0.0
    drop = np.maximum(np.append(drop, 0.0), np.append(0.0, drop))
    curve, excess = curve - drop[below:], excess - drop[: below + 1]
    heights = known - np.expm1(np.append(down, up[1:])[: len(known)]) - 4 * UNIT
    excess[: len(known)] = np.minimum(excess[: len(known)], known[: below + 1])
    curve[: max(0, len(known) - below)] = np.minimum(curve[: max(0, len(known) - below)], heights[below:])
    # Where a value would be negative it is 0, and one point further in too: chords from there are low enough.
    negative = np.flatnonzero(excess < 0)
    excess[: int(negative[-1]) + 2 if len(negative) else 0] = 0.0
    curve[0] = excess[-1] = min(curve[0], excess[-1])
    negative = np.flatnonzero(curve < 0)
    curve[max(0, int(negative[0]) - 1) if len(negative) else -1 :] = 0.0
    # Slopes straightened from below, which only lowers the curve.
    rest = (excess[1:] - excess[:-1]) * np.exp(-down[:-1]) / math.expm1(mesh)
    rest = np.minimum(np.maximum.accumulate(np.maximum(rest, 0.0)), 1.0)
    slopes = (curve[:-1] - curve[1:]) * np.exp(-up[:-1]) / math.expm1(mesh)
    slopes = np.append(np.minimum.accumulate(np.clip(slopes, 0.0, 1 - rest[-1])), 0.0)
    middle = [max(0.0, 1 - rest[-1] - slopes[0] - 4 * UNIT)]
    jumps = np.concatenate([np.diff(rest), middle, slopes[:-1] - slopes[1:]])
    masses = np.append(0.0, jumps * np.exp(mesh * np.arange(1 - below, above + 1)))
    return Law(-below, masses * (1 - 16 * UNIT), 0.0)


def _tangents(step: Step, losses: Array) -> Array:
    """Compute an excess at the first losses whose chords are tangents of the curve, one after the other."""
    heights = np.zeros(len(losses))
    j = 0
    while j < len(losses) - 1:
        start, low, high = float(losses[j]), float(losses[j]), FARTHEST
        for _ in range(90):
            middle = (low + high) / 2
            above = _above_tangent(step, start, middle)[0] > heights[j]
            low, high = (middle, high) if above else (low, middle)
        slope = _above_tangent(step, start, low)[1] * (1 - 1e-12)
        after = max(j + 1, min(int(np.searchsorted(losses, low, "right")), len(losses) - 1))
        widths = math.exp(start) * np.expm1(losses[j + 1 : after + 1] - start)
        heights[j + 1 : after + 1] = np.maximum(heights[j] + slope * widths - 8 * UNIT, 0.0)
        j = after
    return heights


def _above_tangent(step: Step, start: float, loss: float) -> tuple[float, float]:
    """Return the height over `start` of the tangent of the excess at `loss`, and its slope: the mass of Q below."""
    s, q = step.noise_multiplier, step.sampling_rate
    at = np.array([loss])
    before, factor = inner(q, at)
    x = s * s * float(before[0]) + 0.5 if factor[0] > 0 else -math.inf
    width = math.exp(start) * math.expm1(loss - start)
    slope = float(ndtr(x / s))
    if loss <= 0:
        return float(_excess(step, True, at)[0]) - slope * width, slope
    # The excess H + exp(loss) - 1 and 1 - slope in its place: no large numbers are subtracted.
    return float(_curve(step, True, at)[0]) + math.expm1(start) + float(ndtr(-x / s)) * width, slope


def _curve(step: Step, removed: bool, losses: Array) -> Array:
    """The curve H at losses >= 0, rounded down."""
    s, q = step.noise_multiplier, step.sampling_rate
    if not removed:
        return np.exp(np.minimum(losses, FARTHEST)) * _excess(step, True, -losses) * (1 - 8 * UNIT)
    value, _, room = gaussian(s, inner(q, losses)[0])
    return q * np.maximum(value - room, 0.0) * (1 - 8 * UNIT)


def _excess(step: Step, removed: bool, losses: Array) -> Array:
    """The excess H(e) - (1 - exp(e)) at losses <= 0, rounded down."""
    s, q = step.noise_multiplier, step.sampling_rate
    if not removed:
        return np.exp(losses) * _curve(step, True, -losses) * (1 - 8 * UNIT)
    before, factor = inner(q, losses)
    value, ceiling, room = gaussian(s, np.where(factor > 0, -before, 0.0))
    return np.where(
        factor > 0,
        np.maximum(factor * (value - room) - 16 * UNIT * rounded(q, losses, factor) * ceiling, 0.0),
        0.0,
    )


def _drops(step: Step, removed: bool, losses: Array) -> Array:
    """Bound how far H lies below its chord in each cell: width * (difference of the slopes at its ends) / 4."""
    s, q = step.noise_multiplier, step.sampling_rate
    before, factor = inner(q, losses if removed else -losses)
    x = s * s * np.where(factor > 0, before, -np.inf) + 0.5
    # the mass of Q above and below each loss; a slope of H is minus the mass above
    above = ndtr(-x / s) if removed else (1 - q) * ndtr(x / s) + q * ndtr((x - 1) / s)
    below = ndtr(x / s) if removed else (1 - q) * ndtr(-x / s) + q * ndtr((1 - x) / s)
    cells = np.maximum(np.where(above[:-1] < 0.5, -np.diff(above), np.diff(below)), 0.0)
    cells += 1e-12 * np.minimum(above[:-1], below[1:])
    widths = np.exp(losses[:-1]) * np.expm1(np.diff(losses))
    return widths * cells / 4
