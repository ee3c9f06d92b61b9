# SPDX-License-Identifier: Apache-2.0
"""Runs of every sampler, on a dataset whose items are their indices."""

import json

from accountants import (
    ADD_REMOVE,
    REPLACE,
    ZERO_OUT,
)  # fmt: skip
from dpopt import (
    BallsInBins,
    CyclicSampling,
    FixedSizeSampling,
    FlatClipper,
    GaussianMechanism,
    PoissonSampling,
    PrivateTraining,
    ShuffledSampling,
    TruncatedPoissonSampling,
    Users,
    UserSampling,
)  # fmt: skip
from tests.support.dpopt.private_runs import mlp

N, NOISE = 12, 1.0
CASES = {
    "poisson": (PoissonSampling(0.25, 3.0), ADD_REMOVE),
    "truncated-poisson": (TruncatedPoissonSampling(0.25, 11, N, 3.0), ADD_REMOVE),
    "users": (UserSampling(0.25, 3.0), ADD_REMOVE),
    "balls-in-bins": (BallsInBins(4, 3.0), ADD_REMOVE),
    "shuffled": (ShuffledSampling(N, 5), ZERO_OUT),
    "cyclic": (CyclicSampling(N, 5), REPLACE),
    "fixed-size": (FixedSizeSampling(3, N), REPLACE),
}


class Numbers:
    """A dataset whose items are their indices."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return index


def data_of(name):
    return Users.of(Numbers(), range(N), max_records=1) if name == "users" else Numbers()


def run(sampling, relation=ADD_REMOVE, *, model=None, **options):
    return PrivateTraining(
        mlp() if model is None else model,
        clipper=options.pop("clipper", FlatClipper(1.0)),
        mechanism=options.pop("mechanism", GaussianMechanism(NOISE)),
        sampling=sampling,
        relation=relation,
        accountant_name=options.pop("accountant_name", "rdp"),
        **options,
    )


def release(private, dataset, steps):
    """Release `steps` steps without gradients; the batches drawn."""
    drawn = []
    for batch in private.batches(dataset, steps=steps):
        drawn.append(batch.examples)
        private.release()
    return drawn


def records(path):
    return [r for r in map(json.loads, path.read_bytes().splitlines()) if r["kind"] in ("charge", "note")]
