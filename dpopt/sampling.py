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

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch

from accountants import Event, FixedSize, PoissonSampled, TruncatedPoisson
from dpopt.epochs import check_length, check_sizes, check_step

Example = TypeVar("Example", covariant=True)


class Records(Protocol[Example]):
    """A dataset: a length and an item per index; each item is one unit of privacy."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Sampling(Protocol):
    """A sampler. What it charges is what it draws.

    A *round* is what one charge pays for: `steps_per_charge` steps, 1 for samplers that draw each step anew and
    an epoch for those that partition. All steps of a round are drawn from equal generators, those of two rounds
    from independent ones; no step of a round is released twice; the charge comes before the first release.
    """

    @property
    def expected_batch_size(self) -> float:
        """The public constant by which each noisy sum is divided."""
        ...

    @property
    def steps_per_charge(self) -> int:
        """The steps of a round."""
        ...

    def event(self, mechanism: Event) -> Event:
        """The event of one round that runs `mechanism` on each of its batches."""
        ...

    def draw(self, num_records: int, generator: torch.Generator, step: int = 0) -> list[int]:
        """Indices of the batch of step `step` of the round that `generator` draws, in increasing order."""
        ...


class Batch(NamedTuple):
    """One draw, or a part of it: examples that take part in a step, possibly none, and which records they are."""

    examples: tuple[object, ...]
    indices: tuple[int, ...] = ()

    def parts(self, size: int) -> Iterator[Batch]:
        """Micro-batches of at most `size` examples with their indices; none for an empty batch."""
        for start in range(0, len(self.examples), size):
            yield Batch(self.examples[start : start + size], self.indices[start : start + size])

    def split(self, size: int) -> Iterator[list]:
        """Micro-batches of at most `size` examples; none for an empty batch."""
        for start in range(0, len(self.examples), size):
            yield list(self.examples[start : start + size])

    def padded(self, size: int, filler: object) -> tuple[list, list[bool]]:
        """The examples filled up with `filler`, which is public or made up, to the fixed `size`; and which are real.

        Give the second to `PrivateTraining.accumulate` as `keep`: a filled-in row then adds exactly nothing.
        """
        if len(self.examples) > size:
            raise ValueError(
                f"expected at most {size} examples; got more; pad to the sampler's max_batch_size"
            )
        missing = size - len(self.examples)
        return [*self.examples, *[filler] * missing], [True] * len(self.examples) + [False] * missing


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


def padded(indices: Sequence[int], size: int) -> tuple[list[int], list[bool]]:
    """Fill `indices` up to the fixed `size` with index 0, and say which are real; the rest must contribute nothing."""
    if len(indices) > size:
        raise ValueError(f"expected at most {size} indices; got more; pad to the sampler's max_batch_size")
    missing = size - len(indices)
    return [*indices, *[0] * missing], [True] * len(indices) + [False] * missing


def poisson(*, num_records: int, batch_size: float) -> PoissonSampling:
    """Poisson sampling with `batch_size` expected examples out of a public number of records."""
    if not 0 < batch_size <= num_records:
        raise ValueError(
            f"expected 0 < batch_size <= num_records; got {batch_size} of {num_records}; lower the batch size"
        )
    return PoissonSampling(batch_size / num_records, float(batch_size))
