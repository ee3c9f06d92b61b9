# SPDX-License-Identifier: Apache-2.0
"""The samplers by name. To add one: write its class, add one line here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from dpopt.sampling.epochs import BallsInBins, CyclicSampling, ShuffledSampling
from dpopt.sampling.fixed_size import FixedSizeSampling
from dpopt.sampling.poisson import PoissonSampling, TruncatedPoissonSampling
from dpopt.sampling.sampler import Sampling, check_sizes
from dpopt.sampling.users import UserSampling

SAMPLERS: Mapping[str, Callable[..., Sampling]] = {
    "balls-in-bins": BallsInBins,
    "cyclic": CyclicSampling,
    "fixed-size": FixedSizeSampling,
    "poisson": PoissonSampling,
    "shuffled": ShuffledSampling,
    "truncated-poisson": TruncatedPoissonSampling,
    "users": UserSampling,
}
"""Name: class."""


def sampler(name: str) -> Callable[..., Sampling]:
    """Return the sampler class called `name`.

    Raises:
        ValueError: no sampler has this name.
    """
    if name not in SAMPLERS:
        raise ValueError(
            f"expected a sampler out of {sorted(SAMPLERS)}; got {name!r}; 'poisson' is the usual one"
        )
    return SAMPLERS[name]


def require_sized(name: str) -> None:
    """Raise ValueError for a sampler that a batch size and a number of records do not make."""
    sampler(name)
    if name == "users":
        raise ValueError(
            "expected a sampler of records; got 'users', which needs to know whose each record is; use PrivateTraining "
            "with UserSampling on Users.of(...)"
        )


def sized(name: str, *, num_records: int, batch_size: int) -> Sampling:
    """The sampler called `name` that draws batches of about `batch_size` out of a public number of records.

    The truncated one keeps batches 6 standard deviations and 10 examples above the mean whole.
    """
    require_sized(name)
    check_sizes(batch_size, num_records)
    rate, mean = batch_size / num_records, float(batch_size)
    match name:
        case "poisson":
            return PoissonSampling(rate, mean)
        case "truncated-poisson":
            most = math.ceil(mean + 6 * math.sqrt(mean * (1 - rate))) + 10
            return TruncatedPoissonSampling(rate, min(num_records, most), num_records, mean)
        case "balls-in-bins":
            batches = math.ceil(num_records / batch_size)
            return BallsInBins(batches, num_records / batches)
        case "cyclic":
            return CyclicSampling(num_records, batch_size)
        case "shuffled":
            return ShuffledSampling(num_records, batch_size)
    return FixedSizeSampling(batch_size, num_records)


def population(sampling: Sampling) -> float:
    """About how many records (of users: users) a sampler draws from, as far as its public numbers tell."""
    if isinstance(sampling, PoissonSampling | UserSampling):
        return sampling.expected_batch_size / sampling.sampling_rate
    if isinstance(sampling, BallsInBins):
        return sampling.expected_batch_size * sampling.num_batches
    return getattr(sampling, "num_records", 1.0)


def touched(sampling: Sampling, steps: int) -> float:
    """The probability that a given record takes part in at least one of `steps` steps; 1 where it is not known."""
    if steps < 1:
        return 0.0
    if isinstance(sampling, FixedSizeSampling):
        rate = sampling.batch_size / sampling.num_records
    elif isinstance(sampling, PoissonSampling | UserSampling | TruncatedPoissonSampling):
        rate = sampling.sampling_rate
    else:
        return 1.0
    return 1.0 if rate >= 1 else -math.expm1(steps * math.log1p(-rate))


def charges(sampling: Sampling, steps: int) -> int:
    """The charges that pay for `steps` steps from the beginning of a round."""
    return -(-steps // sampling.steps_per_charge)
