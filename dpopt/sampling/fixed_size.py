# SPDX-License-Identifier: Apache-2.0
"""Batches of exactly so many examples, every such subset equally likely."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accountants import Event, FixedSize
from dpopt.sampling.sampler import check_length, check_sizes, check_step


@dataclass(frozen=True, slots=True)
class FixedSizeSampling:
    """Exactly `batch_size` of exactly `num_records` examples each step, every such subset equally likely.

    Guarantees
    ----------
    The event is `FixedSize(...)`, priced under replace-one (and zero-out-one as a case of it) by Balle, Barthe, Gaboardi
    2018, arXiv:1807.01647, without replacement; refused under add-or-remove-one
    (test_guarantee_fixed_size_draws_every_subset_alike).
    """

    batch_size: int
    num_records: int

    def __post_init__(self) -> None:
        check_sizes(self.batch_size, self.num_records)

    @property
    def steps_per_charge(self) -> int:
        """One: each step is a draw of its own."""
        return 1

    @property
    def expected_batch_size(self) -> float:
        """The public constant by which each noisy sum is divided."""
        return float(self.batch_size)

    def event(self, mechanism: Event) -> Event:
        """The event of one step that runs `mechanism` on one draw."""
        return FixedSize(self.batch_size, self.num_records, mechanism)

    def draw(self, num_records: int, generator: torch.Generator, step: int = 0) -> list[int]:
        """Indices of one batch, in increasing order."""
        check_step(step, 1)
        check_length(num_records, self.num_records)
        # Not torch.randperm, whose remainders of 32 bits are uneven by num_records / 2^32.
        uniform = torch.rand(num_records, dtype=torch.float64, generator=generator, device=generator.device)
        return sorted(torch.argsort(uniform)[: self.batch_size].tolist())
