# SPDX-License-Identifier: Apache-2.0
"""One direction of add-or-remove for a composition of steps: any grid can be laid over it."""

import math
from dataclasses import dataclass

import numpy as np

from accountants.dominating_pairs.grid_law import FARTHEST
from accountants.dominating_pairs.kinds import KINDS, reaches
from accountants.dominating_pairs.sampled_step import Step
from accountants.privacy_loss.fft_composition import Tail, compose
from accountants.privacy_loss.window import Outlook, look

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
        """Look at one direction, to answer questions about deltas near `delta`; None where more lies beyond any grid.

        Losses above `FARTHEST` are taken for infinite, those below -`FARTHEST` for that.
        """
        total = sum(count for _, count in steps)
        ends = reaches([step for step, _ in steps], removed, _SMALL * delta / total)
        beyond = [
            count * KINDS[step.pair].law(step, removed, FARTHEST / 2, (-FARTHEST, FARTHEST)).infinite
            for (step, count), (_, high) in zip(steps, ends, strict=True)
            if high > FARTHEST
        ]
        if math.fsum(beyond) >= delta:
            return None
        ends = [(max(low, -FARTHEST), min(high, FARTHEST)) for low, high in ends]
        return cls(steps, removed, ends, look(steps, ends, removed=removed))

    def tail(
        self,
        mesh: float,
        coarsest: float,
        tilt: float,
        low: float,
        delta: float,
        kind: type[np.floating] = np.float64,
    ) -> tuple[float, Tail] | None:
        """Compose on a grid of `mesh`, or of the finest affordable one, which is returned before the tail.

        None where no affordable grid tells anything: the losses spread too far.

        Args:
            mesh: the mesh asked for.
            coarsest: the largest mesh that is of use.
            tilt: the exponent of the tilt.
            low: a lower bound of the epsilon asked for.
            delta: about the delta asked for.
            kind: the precision of the transforms.
        """
        most = min(MAX_POINTS, MAX_WORK // len(self.steps)) // (1 if kind is np.float64 else 4)
        widest = max(high - low for low, high in self.ends)
        while True:
            window = self.outlook.window(mesh, tilt, low, math.log(_SMALL * delta))
            if window is None:
                return None
            points = max(window.size, widest / mesh)
            if points <= most:
                break
            mesh = few_digits(1.05 * mesh * points / most)
            if mesh > coarsest:
                return None
        laws = tuple(
            (KINDS[step.pair].law(step, self.removed, mesh, ends), count)
            for (step, count), ends in zip(self.steps, self.ends, strict=True)
        )
        return mesh, compose(laws, window, kind)

    def mesh(self, error: float, slope: float) -> float:
        """Return the mesh that raises epsilon by about `error`: with so few digits that its multiples are exact.

        The chords add the variance mesh^2 / 6 to each step, hence steps * mesh^2 (1 + slope) / 12 to epsilon.
        """
        return few_digits(min(0.25, math.sqrt(12 * error / self.outlook.steps / (1 + slope))))

    def error(self, mesh: float, slope: float) -> float:
        """Predict by how much `mesh` raises epsilon."""
        return mesh * mesh * self.outlook.steps * (1 + slope) / 12


def few_digits(mesh: float) -> float:
    """Round to 24 binary digits, so that multiples of a mesh are exact."""
    mantissa, exponent = math.frexp(mesh)
    return math.ldexp(round(mantissa * 2**24), exponent - 24)
