# SPDX-License-Identifier: Apache-2.0
"""Samplers that partition the records once an epoch: each record in at most one of its batches, charged once.

A charge pays for all steps of an epoch and is made before the first release of it. A run that ends in the middle has
paid for the whole; the next run draws a new partition and pays again. Never priced as Poisson: at noise multiplier 1
and 1000 batches that is 20 times too little (Chua et al. 2024, arXiv:2403.17673).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from accountants import BY_POSITION, BY_RECORD, Event, OncePerEpoch
from dpopt.sampling.sampler import check_count, check_length, check_sizes, check_step


@dataclass(frozen=True, slots=True)
class BallsInBins:
    """Each record joins one of the epoch's `num_batches` batches, by a coin of its own; a batch may be empty.

    Guarantees
    ----------
    The event is `OncePerEpoch(num_batches, BY_RECORD, ...)`: one unamplified Gaussian an epoch, also when records are
    added or removed, since no coin depends on who else is there. No amplification is claimed: for balls in bins the
    known figures are Monte Carlo estimates (Chua et al. 2025, arXiv:2412.16802)
    (test_guarantee_epochs_give_each_record_one_batch, test_guarantee_once_per_epoch_covers_a_shuffle_that_poisson_does_not).
    """

    num_batches: int
    expected_batch_size: float

    def __post_init__(self) -> None:
        check_count(self.num_batches, "num_batches")
        if not (math.isfinite(self.expected_batch_size) and self.expected_batch_size > 0):
            raise ValueError(
                f"expected a finite expected_batch_size > 0; got {self.expected_batch_size}; use the public number of "
                "records over num_batches"
            )

    @property
    def steps_per_charge(self) -> int:
        """The batches of an epoch."""
        return self.num_batches

    def event(self, mechanism: Event) -> Event:
        """The event of one epoch that runs `mechanism` on each batch."""
        return OncePerEpoch(self.num_batches, BY_RECORD, mechanism)

    def draw(self, num_records: int, generator: torch.Generator, step: int = 0) -> list[int]:
        """Indices of batch `step` of the epoch that `generator` draws, in increasing order."""
        check_step(step, self.num_batches)
        uniform = torch.rand(num_records, dtype=torch.float64, generator=generator, device=generator.device)
        return torch.nonzero((uniform * self.num_batches).long() == step).flatten().tolist()


@dataclass(frozen=True, slots=True)
class ShuffledSampling:
    """A new order of the `num_records` records each epoch, cut into batches of `batch_size`; the last may be smaller.

    Guarantees
    ----------
    The event is `OncePerEpoch(num_batches, BY_POSITION, ...)`: one unamplified Gaussian an epoch under zero-out-one and
    replace-one, where the length is public. Refused under add-or-remove-one: a new record moves all those behind
    it to other batches (test_guarantee_epochs_give_each_record_one_batch).
    """

    num_records: int
    batch_size: int

    def __post_init__(self) -> None:
        check_sizes(self.batch_size, self.num_records)

    @property
    def steps_per_charge(self) -> int:
        """The batches of an epoch."""
        return -(-self.num_records // self.batch_size)

    @property
    def expected_batch_size(self) -> float:
        """The public constant by which each noisy sum is divided."""
        return float(self.batch_size)

    def event(self, mechanism: Event) -> Event:
        """The event of one epoch that runs `mechanism` on each batch."""
        return OncePerEpoch(self.steps_per_charge, BY_POSITION, mechanism)

    def draw(self, num_records: int, generator: torch.Generator, step: int = 0) -> list[int]:
        """Indices of batch `step` of the epoch that `generator` draws, in increasing order."""
        check_length(num_records, self.num_records)
        check_step(step, self.steps_per_charge)
        order = torch.argsort(
            torch.rand(num_records, dtype=torch.float64, generator=generator, device=generator.device)
        )
        start = step * self.batch_size
        return sorted(order[start : start + self.batch_size].tolist())


@dataclass(frozen=True, slots=True)
class CyclicSampling:
    """The `num_records` records in the order of the dataset, in batches of `batch_size`, the same ones each epoch.

    Guarantees
    ----------
    As `ShuffledSampling`, given that the place of a record in the dataset does not depend on what the records hold:
    a dataset sorted by length or label breaks it.
    """

    num_records: int
    batch_size: int

    def __post_init__(self) -> None:
        check_sizes(self.batch_size, self.num_records)

    @property
    def steps_per_charge(self) -> int:
        """The batches of an epoch."""
        return -(-self.num_records // self.batch_size)

    @property
    def expected_batch_size(self) -> float:
        """The public constant by which each noisy sum is divided."""
        return float(self.batch_size)

    def event(self, mechanism: Event) -> Event:
        """The event of one epoch that runs `mechanism` on each batch."""
        return OncePerEpoch(self.steps_per_charge, BY_POSITION, mechanism)

    def draw(self, num_records: int, generator: torch.Generator, step: int = 0) -> list[int]:
        """Indices of batch `step`; nothing is drawn."""
        check_length(num_records, self.num_records)
        check_step(step, self.steps_per_charge)
        start = step * self.batch_size
        return list(range(start, min(start + self.batch_size, num_records)))
