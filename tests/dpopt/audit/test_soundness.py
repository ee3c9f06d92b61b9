# SPDX-License-Identifier: Apache-2.0
"""Lower bounds made of canaries lie below the claim of the ledger, whatever samples, estimates and draws the noise."""

import itertools
from collections import Counter
from functools import partial

import pytest
import torch
from scipy.stats import binom

from accountants import ADD_REMOVE, REPLACE
from clipping import named_clipper
from dpopt.audit import (
    clopper_pearson,
    fdp_one_run,
    full_signal,
    gdp_scores,
    gdp_threshold,
    order_statistics,
    per_step,
    steinke,
)
from dpopt.estimators.plain import Plain
from dpopt.sampling import BallsInBins, Users, UserSampling
from tests.dpopt.audit.test_canaries import SAMPLERS
from tests.support.dpopt.auditing import NUM, audited, canaries, losses_of_users, model_for, records, train

DELTA, CANARIES, STEPS = 1e-5, 200, 8
ESTIMATORS = ("flat", "automatic", "psac", "per_layer", "quantile", "slack", "huber", "median", "geometric_median",
              "two_threshold", "diff2", "schedule:steps=8,clip_end=0.5")  # fmt: skip
TIERS = ("fast", "secure")
WHOLE_RUN = (full_signal, gdp_scores, order_statistics, gdp_threshold, clopper_pearson)
ANY = (fdp_one_run, steinke)


def settings():
    """Every sampler, estimator and tier that go together."""
    for sampler, estimator, tier in itertools.product((*SAMPLERS, "users"), ESTIMATORS, TIERS):
        sampling, _ = SAMPLERS.get(sampler, (UserSampling(0.5, 6.0), ADD_REMOVE))
        if sampling.steps_per_charge == 1 or not estimator.startswith(("diff2", "schedule")):
            yield sampler, estimator, tier


def exceeded(sampler, estimator, tier, seed):
    """For each bound that applies: whether it lies above the claim of one run."""
    sampling, _ = SAMPLERS.get(sampler, (UserSampling(0.5, 6.0), ADD_REMOVE))
    relation = (
        ADD_REMOVE
        if sampler in ("poisson", "truncated-poisson", "users") or isinstance(sampling, BallsInBins)
        else REPLACE
    )
    made = estimator
    model = model_for(CANARIES)
    if estimator == "per_layer":
        from clipping import Contribution

        made = Plain(Contribution(named_clipper("per_layer", model, 0.5)))
    run, model, dataset = audited(
        CANARIES, sampling=sampling, estimator=made, randomness=tier, relation=relation, insecure_seed=seed, noise=2.5,
        model=model, audit=canaries(CANARIES), accountant_name="pld",
    )  # fmt: skip
    if sampler == "users":
        train_users(run, model)
    else:
        train(run, model, dataset, steps=STEPS)
    claim = run.epsilon(DELTA)
    found = {}
    for evidence in run.evidence:
        for bound in (
            (per_step,) if evidence.per_step else (*(WHOLE_RUN if evidence.independent else ()), *ANY)
        ):
            if not evidence.independent and bound is per_step:
                continue
            if bound is full_signal and evidence.noise_std is None:
                continue
            found[bound.__name__, evidence.kind] = bound(evidence, DELTA).epsilon > claim
    return found


def train_users(run, model):
    dataset = Users.of(records(CANARIES), [i // 2 for i in range(NUM)], max_records=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with run:
        for batch in run.batches(dataset, steps=STEPS):
            if batch.examples:
                run.evaluate(partial(losses_of_users, model, batch.examples))
            run.release()
            optimizer.step()


def check(combinations, seeds):
    runs, above = Counter(), Counter()
    for (number, what), seed in itertools.product(enumerate(combinations), seeds):
        for name, over in exceeded(
            *what, 1000 * seed + number
        ).items():  # of one seed, all would have the same noise
            runs[name] += 1
            above[name] += over
    told = {name: (above[name], runs[name]) for name in runs}
    print(told)
    assert all(above[name] <= binom.ppf(0.999, runs[name], 0.05) for name in runs), told
    return told


def test_guarantee_bounds_of_canaries_lie_below_the_claim():
    pytest.importorskip("cryptography")
    some = [("poisson", "flat", "fast"), ("poisson", "quantile", "secure"), ("fixed-size", "flat", "fast"),
            ("balls-in-bins", "two_threshold", "fast"), ("cyclic", "per_layer", "secure"), ("users", "automatic", "fast"),
            ("truncated-poisson", "huber", "fast"), ("shuffled", "slack", "fast"), ("poisson", "diff2", "fast")]  # fmt: skip
    check(some, seeds=(1, 2))


@pytest.mark.slow
def test_guarantee_bounds_lie_below_the_claim_for_every_sampler_estimator_and_tier():
    pytest.importorskip("cryptography")
    every = list(settings())
    told = check(every, seeds=range(4))
    assert max(runs for _, runs in told.values()) >= 200
