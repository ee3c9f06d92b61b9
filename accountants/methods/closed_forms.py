# SPDX-License-Identifier: Apache-2.0
"""Compositions as merged leaves: their algebra, and the answers that need no grid."""

import math
from collections import Counter

from accountants.dominating_pairs.gaussian import (
    gaussian_delta,
    gaussian_epsilon,
    sampled_delta,
    sampled_epsilon,
    smallest,
)
from accountants.dominating_pairs.grid_law import FARTHEST
from accountants.dominating_pairs.kinds import KINDS
from accountants.dominating_pairs.sampled_step import Step
from accountants.events import Gaussian, NonPrivate, PoissonSampled
from accountants.methods.rdp import RenyiCurve
from accountants.methods.renyi_divergences import total_divergences
from accountants.relations import Pair, Pairs, merged

Leaves = Pairs
"""Pairs with their counts, equal ones merged, in canonical order; what `relations.priced` returns."""


def added(items: Leaves, others: Leaves) -> Leaves:
    """Return the composition of both."""
    counts: Counter[Pair] = Counter(dict(items))
    counts.update(dict(others))
    return merged(counts)


def multiplied(items: Leaves, count: int) -> Leaves:
    """Return `count` runs of the composition."""
    return tuple((leaf, n * count) for leaf, n in items if count)


def closed_epsilon(items: Leaves, delta: float) -> float | None:
    """Return the exact epsilon at `delta`, rounded up; None where no closed form is known."""
    match items:
        case ():
            return 0.0
        case ((PoissonSampled(sampling_rate=q, event=Gaussian(noise_multiplier=s)), 1),):
            return sampled_epsilon(1 / s, q, delta)
        case ((Step() as step, 1),):
            found = (
                smallest(lambda e: _step_delta(step, e) <= delta, start=1.0) if delta > 1e-300 else math.inf
            )
            return found if found < FARTHEST else None
        case _ if any(isinstance(leaf, NonPrivate) for leaf, _ in items):
            return math.inf
        case _:
            mu = total_mu(items)
            return None if mu is None else gaussian_epsilon(mu, delta)


def closed_delta(items: Leaves, epsilon: float) -> float | None:
    """Return the exact delta at `epsilon`, rounded up; None where no closed form is known."""
    match items:
        case _ if any(isinstance(leaf, NonPrivate) for leaf, _ in items):
            return 1.0
        case _ if not items or math.isinf(epsilon):
            return 0.0
        case ((PoissonSampled(sampling_rate=q, event=Gaussian(noise_multiplier=s)), 1),):
            return sampled_delta(1 / s, q, epsilon)
        case ((Step() as step, 1),) if epsilon < FARTHEST:
            return _step_delta(step, epsilon)
        case _:
            mu = total_mu(items)
            return None if mu is None else gaussian_delta(mu, epsilon)


def _step_delta(step: Step, epsilon: float) -> float:
    return KINDS[step.pair].delta(step, epsilon)


def total_mu(items: Leaves) -> float | None:
    """Sum up the Gaussians as one, rounded up; None when other mechanisms take part."""
    if not all(isinstance(leaf, Gaussian) for leaf, _ in items):
        return None
    scales = [math.sqrt(n) / leaf.noise_multiplier for leaf, n in items if isinstance(leaf, Gaussian)]
    return math.hypot(*scales) * (1 + 1e-15)


def renyi_curve(items: Leaves) -> RenyiCurve:
    """Return the Renyi curve of the composition."""
    return RenyiCurve(total_divergences(items))
