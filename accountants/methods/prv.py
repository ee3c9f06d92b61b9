# SPDX-License-Identifier: Apache-2.0
"""Privacy-loss accounting by Fourier transform: within a hundredth of the truth in epsilon.

The privacy loss of each step is discretised on a common grid and composed in Fourier space (Gopi, Lee,
Wutschitz 2021, arXiv:2106.02848). With the mesh and the domain of theorem 5.5 and remark 5.6, the composed
estimate is within `eps_error` and `delta_error` of the truth; what is reported is the *upper* end. Grid,
cell-centred discretisation and the reading of epsilon are those of the library `prv_accountant`; the law of
one step (`accountants.dominating_pairs.sampled_step`) and the composition are ours, so that its mean keeps its digits where the
library gives up ("discrete and continuous mean differ").

Every answer is one of these, chosen by numbers that are fixed before the data are seen; `Bound.method` says which:
1. all leaves Gaussian, or a single sampled step: the closed form, exact;
2. the upper end of the Fourier estimate, with the error of Opacus, where its grid is small, it is numerically sound, and
   that error is no more than a fiftieth of the answer;
3. else connected dots (`accountants.methods.pld`), which are tighter, and sound where the estimate is not;
4. the Renyi bound, where that is less.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from accountants.curve import FIXED_SCHEDULE, Bound
from accountants.dominating_pairs.sampled_step import ONE, Step
from accountants.events import Event
from accountants.methods.closed_forms import Leaves, closed_delta, closed_epsilon, renyi_curve
from accountants.methods.lazy_curve import LazyCurve, Pricing
from accountants.methods.pld import pld_bound, pld_delta
from accountants.methods.rdp import RenyiCurve
from accountants.methods.renyi_divergences import renyi
from accountants.privacy_loss.prv_convolution import compose
from accountants.relations import ADD_REMOVE, as_step

EPS_ERROR = 0.01
"""Absolute error of the estimate: the setting of Opacus, hence the same numbers."""
LEAST = 0.5
"""The least epsilon for which that error will do."""
MAX_CELLS = 1_000_000
"""The largest grid built, about 0.1 gigabytes."""
MAX_WORK = 4_000_000
"""The largest product of cells and distinct mechanisms."""

_REMOVE = "the remove-one loss dominates the add-one loss under composition (no counterexample is known)"


@dataclass(frozen=True, slots=True)
class PRV:
    """The Fourier accountant: the numbers of Opacus where they are close, else those of "pld".

    Guarantees (of its curves):
        - never below the truth, and never above the Renyi bound of the same leaves.
        - `bound(delta).method` is "closed form", "prv", "pld" or "rdp".
    """

    name: str = "prv"
    adaptive: bool = False
    relation: str = ADD_REMOVE

    def curve(self, event: Event) -> LazyCurve:
        """Price `event`; raises `UnpricedEvent`, naming the leaf."""
        return LazyCurve.of(event, Pricing(_bound, _delta), self.relation)


@lru_cache(maxsize=1024)
def _bound(items: Leaves, delta: float) -> Bound:
    if closed_epsilon(items, delta) is None:
        safe = renyi_curve(items).epsilon(delta)
        found = _fourier_epsilon(items, delta) if LEAST <= safe < math.inf else None
        if found is not None and LEAST <= found <= safe:
            return Bound(found, delta, "prv", (FIXED_SCHEDULE, _REMOVE))
    return pld_bound(items, delta)


@lru_cache(maxsize=1024)
def _delta(items: Leaves, epsilon: float) -> float:
    if closed_delta(items, epsilon) is None and LEAST <= epsilon < math.inf:
        safe = renyi_curve(items).delta(epsilon)
        found = _fourier_delta(items, epsilon, safe)
        if found is not None and found <= safe:
            return found
    return pld_delta(items, epsilon)


def _steps(items: Leaves) -> tuple[tuple[Step, int], ...] | None:
    """Write the leaves as steps that the library discretises: one record, there or not."""
    steps = tuple((as_step(leaf), count) for leaf, count in items)
    return steps if all(step.pair == ONE for step, _ in steps) else None


def _grid(items: Leaves, delta_error: float) -> tuple[float, float] | None:
    """Return half-width and mesh of theorem 5.5 and remark 5.6, with our Renyi bound inside; None for large grids."""
    total = sum(n for _, n in items)
    mesh = EPS_ERROR / math.sqrt(total / 2 * math.log(12 / delta_error))
    most = min(MAX_CELLS, MAX_WORK // len(items))
    width = max(renyi_curve(items).epsilon(delta_error / 4), EPS_ERROR) + 3
    if 2 * width > most * mesh:
        return None
    width = max(width, *(RenyiCurve(renyi(leaf)).epsilon(delta_error / 8 / total) + 3 for leaf, _ in items))
    return None if 2 * width > most * mesh else (width, mesh)


def _fourier_epsilon(items: Leaves, delta: float) -> float | None:
    """Return the upper end of the Fourier estimate; None where it is unaffordable or unsound."""
    steps, delta_error = _steps(items), delta / 1000
    grid = _grid(items, delta_error) if steps is not None and delta_error > 1e-300 else None
    if steps is None or grid is None:
        return None
    composed = compose(steps, *grid, delta_error)
    return None if composed is None else composed.epsilon(delta, delta_error, EPS_ERROR)


def _fourier_delta(items: Leaves, epsilon: float, safe: float) -> float | None:
    """Return the upper end of the Fourier estimate of delta; None where it is unaffordable or unsound."""
    steps, best = _steps(items), None
    for _ in range(3):
        delta_error = (safe if best is None else best) / 1000
        if steps is None or not 1e-300 < delta_error < 1e-3:
            break
        grid = _grid(items, delta_error)
        composed = None if grid is None else compose(steps, max(grid[0], epsilon + 3), grid[1], delta_error)
        upper = None if composed is None else composed.delta(epsilon, delta_error, EPS_ERROR)
        if upper is None:
            break
        done, best = best is not None and upper > best / 5, upper if best is None else min(best, upper)
        if done:
            break
    return best
