# SPDX-License-Identifier: Apache-2.0
"""Which examples take part in a step, and the event which that implies: accounting follows the sampler that ran."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch

from accountants import Event, PoissonSampled

Example = TypeVar("Example", covariant=True)


class Records(Protocol[Example]):
    """A dataset: a length and an item per index; each item is one unit of privacy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Batch(NamedTuple):
    """One draw: the examples that take part in a step, possibly none."""

    examples: tuple[object, ...]

    def split(self, size: int) -> Iterator[list]:
        """Micro-batches of at most `size` examples; none for an empty batch."""
        for start in range(0, len(self.examples), size):
            yield list(self.examples[start : start + size])


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

    def event(self, mechanism: Event) -> Event:
        """The event of one step that runs `mechanism` on one draw."""
        return PoissonSampled(self.sampling_rate, mechanism)

    def draw(self, num_records: int, generator: torch.Generator) -> list[int]:
        """Indices of one batch, in increasing order; possibly none."""
        # float64: a float32 uniform has 24 bits, which biases small rates.
        uniform = torch.rand(num_records, dtype=torch.float64, generator=generator)
        return torch.nonzero(uniform < self.sampling_rate).flatten().tolist()


def poisson(*, num_records: int, batch_size: float) -> PoissonSampling:
    """Poisson sampling with `batch_size` expected examples out of a public number of records."""
    if not 0 < batch_size <= num_records:
        raise ValueError(
            f"expected 0 < batch_size <= num_records; got {batch_size} of {num_records}; lower the batch size"
        )
    return PoissonSampling(batch_size / num_records, float(batch_size))
