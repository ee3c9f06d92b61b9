# SPDX-License-Identifier: Apache-2.0
"""Which examples take part in a step, and the event which that implies: accounting follows the sampler that ran.

| sampler | batch | priced as | relations |
|---|---|---|---|
| `PoissonSampling` | each record by a coin | the sampled Gaussian, each step | all |
| `TruncatedPoissonSampling` | the same, at most `max_batch_size` | the same, and a slip in delta | all |
| `FixedSizeSampling` | `batch_size` of them, evenly | its own pair, each step | replace-one, zero-out-one |
| `BallsInBins` | each record in one batch of an epoch | one Gaussian an epoch | all |
| `ShuffledSampling`, `CyclicSampling` | the same, by place | one Gaussian an epoch | replace-one, zero-out-one |
| `UserSampling` | each user by a coin | the sampled Gaussian, unit user | all |

Prices and proofs: `accountants.relations`.
"""

from dpopt.sampling.epochs import BallsInBins, CyclicSampling, ShuffledSampling
from dpopt.sampling.fixed_size import FixedSizeSampling
from dpopt.sampling.poisson import PoissonSampling, TruncatedPoissonSampling, poisson
from dpopt.sampling.sampler import Batch, Records, Sampling
from dpopt.sampling.users import Users, UserSampling

__all__ = [
    "BallsInBins",
    "Batch",
    "CyclicSampling",
    "FixedSizeSampling",
    "PoissonSampling",
    "Records",
    "Sampling",
    "ShuffledSampling",
    "TruncatedPoissonSampling",
    "UserSampling",
    "Users",
    "poisson",
]
