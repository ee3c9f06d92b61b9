# SPDX-License-Identifier: Apache-2.0
"""Which bounds are tried on which evidence, so that all of them hold together.

The law of this file: what is tried, and at which confidence, follows from what the evidence *is* (its declared fields),
never from its scores or coins. The first bound tried gets half of the significance, the others share the rest evenly; by
the union bound all hold together with the stated confidence, and so does the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from dpopt.audit.bounds.families import Family, any_mechanism, poisson_steps
from dpopt.audit.bounds.gaussian import full_signal, gdp_scores
from dpopt.audit.bounds.independent import clopper_pearson, order_statistics
from dpopt.audit.bounds.lower_bound import LowerBound
from dpopt.audit.bounds.one_run import fdp_one_run, steinke
from dpopt.audit.bounds.per_step import per_step
from dpopt.audit.evidence import Evidence, joined

Trial = tuple[Evidence, Callable[[Evidence, float, float], LowerBound]]


def lower_bounds(
    evidence: Sequence[Evidence], delta: float, confidence: float = 0.95, *, family: Family | None = None
) -> tuple[LowerBound, ...]:
    """Every bound that suits the evidence of a run, the one expected to be the sharpest first; all hold together.

    Args:
        evidence: of one run, or of several, joined: whatever was scored.
        delta: the delta at which epsilon is bounded.
        confidence: with which all bounds hold together.
        family: the mechanisms tested against where single steps tell nothing of the run's shape. None: any mechanism.

    Raises:
        ValueError: no evidence, or an argument out of range.

    Guarantees
    ----------
    The largest of the bounds is above the true epsilon with probability at most 1 - confidence, under the assumptions
    that it names (test_guarantee_the_largest_of_all_bounds_holds_at_the_stated_confidence).
    """
    trials = _trials(evidence, delta, family)
    if not trials:
        raise ValueError(
            "expected evidence of a run; got none; train with canaries (dpopt finetune --audit canaries=1000)"
        )
    spare = (1 - confidence) / (1 if len(trials) == 1 else 2)
    rest = 1 - spare / max(1, len(trials) - 1)
    return tuple(
        replace(bound(one, delta, 1 - spare if i == 0 else rest), evidence=one.kind)
        for i, (one, bound) in enumerate(trials)
    )


def _trials(evidence: Sequence[Evidence], delta: float, family: Family | None) -> list[Trial]:
    shape = family or any_mechanism(delta)
    steps = [one for one in evidence if one.num_steps is not None and one.sampling_rate is not None]
    whole = [one for one in evidence if not one.per_step]
    measured = [one for one in whole if one.independent and one.noise_std is not None]
    guessed = [
        one for one in whole if one not in measured
    ] or whole  # sums with known noise say less by their order
    own = poisson_steps(steps[0].sampling_rate or 1.0, steps[0].num_steps or 1) if steps else shape
    trials: list[Trial] = [(one, per_step) for one in steps if one.independent]
    trials += [(one, full_signal) for one in measured]
    trials += [(one, partial(order_statistics, family=own)) for one in guessed if one.independent]
    trials += [(one, gdp_scores) for one in measured]
    trials += [(one, partial(fdp_one_run, family=shape)) for one in guessed if not one.independent]
    return trials + [(one, steinke) for one in guessed]


def of_many_runs(
    runs: Sequence[Sequence[Evidence]],
    delta: float,
    confidence: float = 0.95,
    *,
    family: Family | None = None,
) -> tuple[tuple[Evidence, ...], tuple[LowerBound, ...]]:
    """The evidence of several runs of one configuration, together, and the bounds on it.

    Independent scores are pooled. Of others one record of each run is kept, the first: these are independent, as the
    runs are; they are bounded by the order of the scores and by error rates.

    Raises:
        ValueError: the runs were not scored alike.
    """
    if len({tuple((one.kind, one.independent) for one in run) for run in runs}) != 1:
        kinds = [[one.kind for one in run] for run in runs]
        raise ValueError(
            f"runs that are audited together must be scored alike; got {kinds}; audit them one by one"
        )
    pooled: list[Evidence] = []
    for alike in zip(*runs, strict=True):
        if alike[0].independent:
            pooled.append(joined(alike))
        elif not alike[0].per_step:
            pooled.append(first_of_each(alike))
    told = lower_bounds(pooled, delta, 1 - (1 - confidence) / 2, family=family)
    rates = [one for one in pooled if not one.per_step][-1:]
    spare = (1 - confidence) / 2 / max(1, len(rates))
    return tuple(pooled), (
        *told,
        *(replace(clopper_pearson(one, delta, 1 - spare), evidence=one.kind) for one in rates),
    )


def first_of_each(runs: Sequence[Evidence]) -> Evidence:
    """The first record of each run, as evidence: independent, as the runs are."""
    return Evidence(
        np.array([run.scores[0] for run in runs]),
        np.array([run.included[0] for run in runs]),
        f"{runs[0].kind}, one of each of {len(runs)} runs",
        independent=True,
    )
