# SPDX-License-Identifier: Apache-2.0
"""One direction of add-or-remove for a composition of steps: any grid can be laid over it."""

import math
from dataclasses import dataclass

import numpy as np

from accountants.dots import FARTHEST
from accountants.loss import Step
from accountants.outlook import Outlook, look
from accountants.pairs import KINDS, reaches
from accountants.tilt import Tail, compose

Steps = tuple[tuple[Step, int], ...]

MAX_POINTS = 1 << 22
"""The largest grid built, about a quarter of a gigabyte; beyond it the mesh is coarsened."""
MAX_WORK = 60_000_000
"""The largest product of grid points and distinct mechanisms."""

_SMALL = 1e-5  # the part of delta given to each truncation


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """The steps with the record removed (or added), the losses each must be tabulated between, the moments."""

    steps: Steps
    removed: bool
    ends: list[tuple[float, float]]
    outlook: Outlook

    @classmethod
    def of(cls, steps: Steps, removed: bool, delta: float) -> "Direction | None":
        """Look at one direction, to answer questions about deltas near `delta`; None where losses are too large."""
        total = sum(count for _, count in steps)
        ends = reaches([step for step, _ in steps], removed, _SMALL * delta / total)
        if max(high for _, high in ends) > FARTHEST or min(low for low, _ in ends) < -FARTHEST:
            return None
        return cls(steps, removed, ends, look(steps, ends, removed=removed))

    def tail(
        self, mesh: float, tilt: float, low: float, delta: float, kind: type[np.floating] = np.float64
    ) -> tuple[float, Tail]:
        """Compose on a grid of `mesh`, or of the finest affordable one, which is returned before the tail.

        Args:
            mesh: the mesh asked for.
            tilt: the exponent of the tilt.
            low: a lower bound of the epsilon asked for.
            delta: about the delta asked for.
            kind: the precision of the transforms.
        """
        most = min(MAX_POINTS, MAX_WORK // len(self.steps))
        widest = max(high - low for low, high in self.ends)
        while True:
            window = self.outlook.window(mesh, tilt, low, math.log(_SMALL * delta))
            points = max(window.size, widest / mesh)
            if points <= most:
                break
            mesh = float(np.float32(1.05 * mesh * points / most))
        laws = tuple(
            (KINDS[step.pair].law(step, self.removed, mesh, ends), count)
            for (step, count), ends in zip(self.steps, self.ends, strict=True)
        )
        return mesh, compose(laws, window, kind)

    def mesh(self, error: float, slope: float) -> float:
        """Return the mesh that raises epsilon by about `error`: with so few digits that its multiples are exact.

        The chords add the variance mesh^2 / 6 to each step, hence steps * mesh^2 (1 + slope) / 12 to epsilon.
        """
        return float(np.float32(min(0.25, math.sqrt(12 * error / self.outlook.steps / (1 + slope)))))

    def error(self, mesh: float, slope: float) -> float:
        """Predict by how much `mesh` raises epsilon."""
        return mesh * mesh * self.outlook.steps * (1 + slope) / 12
