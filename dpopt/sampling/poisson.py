# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling: each record by a coin of its own, with or without a public bound on the size of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from accountants import Event, PoissonSampled, TruncatedPoisson
from dpopt.sampling.sampler import check_sizes, check_step


@dataclass(frozen=True, slots=True)
class PoissonSampling:
    """Each example takes part in each step independently with probability `sampling_rate`; a batch may be empty.

    `expected_batch_size` is the public constant by which the noisy sum is divided; both are part of the
    configuration and known to everybody, so neither may be computed from a secret dataset size.

    Guarantees
    ----------
    The event is `PoissonSampled(sampling_rate, ...)`, and `draw` includes each index independently with that
    probability to within 2^-53 (test_guarantee_inclusion_is_independent_at_the_stated_rate).
    Source: Mironov et al. (2019), arXiv:1908.10530, section 2.
    """

    sampling_rate: float
    expected_batch_size: float

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(
                f"expected 0 < sampling_rate <= 1; got {self.sampling_rate}; it is batch size / number of records"
            )
        if not (math.isfinite(self.expected_batch_size) and self.expected_batch_size > 0):
            raise ValueError(
                f"expected a finite expected_batch_size > 0; got {self.expected_batch_size}; use sampling_rate "
                "times the public number of records"
            )

    @property
    def steps_per_charge(self) -> int:
        """One: each step is a draw of its own."""
        return 1

    def event(self, mechanism: Event) -> Event:
        """The event of one step that runs `mechanism` on one draw."""
        return PoissonSampled(self.sampling_rate, mechanism)

    def draw(self, num_records: int, generator: torch.Generator, step: int = 0) -> list[int]:
        """Indices of one batch, in increasing order; possibly none."""
        if step:
            check_step(step, 1)
        # float64: a float32 uniform has 24 bits, which biases small rates.
        uniform = torch.rand(num_records, dtype=torch.float64, generator=generator, device=generator.device)
        return torch.nonzero(uniform < self.sampling_rate).flatten().tolist()


@dataclass(frozen=True, slots=True)
class TruncatedPoissonSampling:
    """A Poisson draw of which at most `max_batch_size` examples, chosen evenly, are kept: for one fixed batch shape.

    `num_records` is a public upper bound on the number of records. Fill a batch up with `padded`; what is filled in
    must contribute nothing. A `max_batch_size` 6 standard deviations above the mean costs next to nothing.

    Guarantees
    ----------
    The event is `TruncatedPoisson(...)`, priced as Poisson and a slip in delta, q P[Binomial(num_records - 1, q) >=
    max_batch_size] each step (test_guarantee_truncated_poisson_covers_the_enumerated_mechanism,
    test_guarantee_truncation_keeps_an_even_choice).
    """

    sampling_rate: float
    max_batch_size: int
    num_records: int
    expected_batch_size: float

    def __post_init__(self) -> None:
        PoissonSampling(self.sampling_rate, self.expected_batch_size)
        check_sizes(self.max_batch_size, self.num_records)

    @property
    def steps_per_charge(self) -> int:
        """One: each step is a draw of its own."""
        return 1

    def event(self, mechanism: Event) -> Event:
        """The event of one step that runs `mechanism` on one draw."""
        return TruncatedPoisson(self.sampling_rate, self.max_batch_size, self.num_records, mechanism)

    def draw(self, num_records: int, generator: torch.Generator, step: int = 0) -> list[int]:
        """Indices of one batch, in increasing order; possibly none."""
        check_step(step, 1)
        if num_records > self.num_records:
            raise ValueError(
                f"expected at most the public {self.num_records} records; got more; raise num_records before training"
            )
        uniform = torch.rand(num_records, dtype=torch.float64, generator=generator, device=generator.device)
        # Among those below the rate, the least uniforms are an even choice.
        drawn = torch.nonzero(uniform < self.sampling_rate).flatten()
        kept = torch.argsort(uniform[drawn])[: self.max_batch_size]
        return torch.sort(drawn[kept]).values.tolist()


def poisson(*, num_records: int, batch_size: float) -> PoissonSampling:
    """Poisson sampling with `batch_size` expected examples out of a public number of records."""
    if not 0 < batch_size <= num_records:
        raise ValueError(
            f"expected 0 < batch_size <= num_records; got {batch_size} of {num_records}; lower the batch size"
        )
    return PoissonSampling(batch_size / num_records, float(batch_size))
