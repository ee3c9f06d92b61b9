# SPDX-License-Identifier: Apache-2.0
"""Canaries among the records that a sampler draws from: the sampler of N + m records, and whose place is whose.

The law of this file: which places are canaries' depends on public numbers alone, and the rate at which a record takes
part is what it was without canaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

from dpopt.sampling import (
    BallsInBins,
    CyclicSampling,
    FixedSizeSampling,
    PoissonSampling,
    Sampling,
    ShuffledSampling,
    TruncatedPoissonSampling,
    UserSampling,
)

_OWN_COINS = (PoissonSampling, UserSampling, BallsInBins)
_SIZED = TypeVar("_SIZED", bound=FixedSizeSampling | ShuffledSampling | CyclicSampling)


def widened(sampling: Sampling, num_canaries: int) -> Sampling:
    """The sampler of a data set that has `num_canaries` more records.

    Where each record has a coin of its own nothing changes. Where the number of records is part of the law, batches
    grow in proportion, rounded down: a record takes part no more often than before.

    Raises:
        ValueError: it is a sampler of somebody else, of which that is not known.
    """
    if isinstance(sampling, _OWN_COINS):
        return sampling
    if isinstance(sampling, TruncatedPoissonSampling):
        share = num_canaries * sampling.sampling_rate
        more = int(np.ceil(share + 6 * np.sqrt(share)))
        return replace(
            sampling,
            num_records=sampling.num_records + num_canaries,
            max_batch_size=min(sampling.num_records + num_canaries, sampling.max_batch_size + more),
        )
    if isinstance(sampling, FixedSizeSampling | ShuffledSampling | CyclicSampling):
        return _grown(sampling, num_canaries)
    raise ValueError(
        f"expected one of dpopt's samplers in an audited run; got {type(sampling).__name__}, of which nobody knows how it "
        "draws from a longer data set; use PoissonSampling, or leave audit out"
    )


def _grown(sampling: _SIZED, num_canaries: int) -> _SIZED:
    num_records = sampling.num_records + num_canaries
    batch_size = max(1, sampling.batch_size * num_records // sampling.num_records)
    return replace(sampling, num_records=num_records, batch_size=batch_size)


class Drawn(NamedTuple):
    """What a draw holds of the data set, and which canaries, in or out."""

    records: list[int]
    canaries: list[int]


def parted(indices: Sequence[int], num_records: int, num_canaries: int) -> Drawn:
    """Part the indices of a draw from N + m places into records of the data set and canaries.

    Place p is a canary's where floor((p + 1) m / (N + m)) exceeds floor(p m / (N + m)): canaries lie evenly among the
    records, so that an order of places has them in all of its batches.
    """
    places = np.asarray(indices, dtype=np.int64)
    whole = num_records + num_canaries
    before = places * num_canaries // whole
    theirs = (places + 1) * num_canaries // whole > before
    return Drawn((places - before)[~theirs].tolist(), before[theirs].tolist())


def law_of(sampling: Sampling) -> tuple[str, float]:
    """How a record takes part: ("each step", rate), ("once in", steps), or ("known", 1) where everybody knows when."""
    if isinstance(sampling, CyclicSampling):
        return "known", 1.0
    if isinstance(sampling, BallsInBins | ShuffledSampling):
        return "once in", float(sampling.steps_per_charge)
    if isinstance(sampling, FixedSizeSampling):
        return "each step", sampling.batch_size / sampling.num_records
    return "each step", float(getattr(sampling, "sampling_rate", 1.0))


def own_coins(sampling: Sampling) -> bool:
    """Whether it says nothing of one record that another takes part."""
    return isinstance(sampling, (*_OWN_COINS, CyclicSampling))
