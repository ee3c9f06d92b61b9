# SPDX-License-Identifier: Apache-2.0
"""Where the answer to a question about a composition lies, before it is computed. It steers, it proves nothing.

The logarithmic moments Psi(b) = log E_P exp(b L) of the composed loss, by quadrature, say how far its tails
reach (Chernoff), which tilt brings the answer into the bulk, and how fine the grid must be.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.fft import next_fast_len

from accountants.dominating_pairs.kinds import KINDS
from accountants.dominating_pairs.sampled_step import Step
from accountants.privacy_loss.fft_composition import Window

Array = NDArray[np.float64]

_NODES = 160
_MOST_POINTS = 1 << 30
_POSITIVE = np.geomspace(1e-6, 1e7, 93)
ORDERS: Array = np.concatenate([-_POSITIVE[::-1], [0.0], _POSITIVE])


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """The moments `psi` of a composed loss at `ORDERS`, and its number of steps."""

    psi: Array
    steps: int

    def at_delta(self, delta: float, known: float = 0.0) -> tuple[float, float]:
        """Estimate epsilon at `delta` (as Renyi would), and -d log delta / d epsilon there.

        Where that is far below `known`, a lesser order is preferred that is still below it: it asks for less.
        """
        b, psi = _POSITIVE, self.psi[-len(_POSITIVE) :]
        values = psi / b - np.log1p(1 / b) - np.log((b + 1) * delta) / b
        least = float(np.min(values))
        best = int(np.flatnonzero(values <= max(least, (max(least, 0.0) + known) / 2))[0])
        return max(float(values[best]), 1e-3 / float(b[best])), float(b[best])

    def at_epsilon(self, epsilon: float, log_known: float = -math.inf) -> tuple[float, float]:
        """Estimate log delta at `epsilon`, and -d log delta / d epsilon there.

        Where that is far below `log_known`, a lesser order is preferred that is still below it.
        """
        b, psi = _POSITIVE, self.psi[-len(_POSITIVE) :]
        values = psi - b * epsilon - b * np.log1p(1 / b) - np.log(b + 1)
        best = int(np.flatnonzero(values <= max(float(np.min(values)), log_known - 3))[0])
        return min(0.0, float(values[best])), float(b[best])

    def window(self, mesh: float, tilt: float, epsilon: float, log_mass: float) -> Window | None:
        """Choose the window so that exp(log_mass) at most lies to its right, or comes back from its left.

        None where the mesh is too coarse to tell.

        Args:
            mesh: the distance of the grid points.
            tilt: the exponent theta.
            epsilon: a value below the answer.
            log_mass: the logarithm of a small part of delta.
        """
        near = np.abs(ORDERS) * mesh < 0.7
        psi = self.psi + self.steps * np.maximum(ORDERS * (ORDERS + 1), 0) * mesh * mesh / 12
        far = np.where(near, tilt - ORDERS, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            right = np.where(near & (ORDERS > 0), (psi - log_mass) / ORDERS, np.inf)
            left = np.where(far > 0, (log_mass + tilt * epsilon - psi) / far, -np.inf)
        best = int(np.nanargmin(right))
        if not math.isfinite(float(right[best])):
            return None
        first = math.floor(min(float(np.nanmax(left)), epsilon) / mesh) - 2
        top = max(float(right[best]), epsilon) / mesh + 2
        return Window(mesh, first, fast_size(math.ceil(top) - first), tilt, float(ORDERS[best]))


def fast_size(points: int) -> int:
    """Round a number of grid points up to one whose transform is fast."""
    return points if points > _MOST_POINTS else int(next_fast_len(max(16, points), real=True) or 0)


def look(steps: tuple[tuple[Step, int], ...], ends: list[tuple[float, float]], *, removed: bool) -> Outlook:
    """Compute the moments of the composition of `steps` (step, count), each truncated to its `ends`."""
    rows = [
        KINDS[step.pair].nodes(step, end, removed, _NODES) for (step, _), end in zip(steps, ends, strict=True)
    ]
    counts = np.array([count for _, count in steps])
    losses, weights = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    psi = np.array([float(counts @ _log_sums(weights + b * losses)) for b in ORDERS])
    return Outlook(psi - psi[len(_POSITIVE)], int(counts.sum()))


def _log_sums(logs: Array) -> Array:
    peak = np.max(logs, axis=1)
    return peak + np.log(np.sum(np.exp(logs - peak[:, None]), axis=1))
