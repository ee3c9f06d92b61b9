# SPDX-License-Identifier: Apache-2.0
"""The protocol of a sampler, the batch that it draws, and the checks that samplers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

from accountants import Event

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


def padded(indices: Sequence[int], size: int) -> tuple[list[int], list[bool]]:
    """Fill `indices` up to the fixed `size` with index 0, and say which are real; the rest must contribute nothing."""
    if len(indices) > size:
        raise ValueError(f"expected at most {size} indices; got more; pad to the sampler's max_batch_size")
    missing = size - len(indices)
    return [*indices, *[0] * missing], [True] * len(indices) + [False] * missing


def check_step(step: int, steps: int) -> None:
    """Refuse a step outside the round of `steps`."""
    if not 0 <= step < steps:
        raise ValueError(
            f"expected 0 <= step < {steps}; got {step}; begin a new round, with a generator of its own"
        )


def check_length(num_records: int, expected: int) -> None:
    """Refuse a dataset of another length than the public one."""
    if num_records != expected:
        raise ValueError(
            f"expected a dataset of the public length {expected}; got another one; make the sampler for this dataset"
        )


def check_sizes(batch_size: int, num_records: int) -> None:
    """Refuse batch sizes outside 1 .. num_records."""
    check_count(batch_size, "batch_size")
    if batch_size > num_records:
        raise ValueError(
            f"expected batch_size <= num_records; got {batch_size} of {num_records}; lower the batch size"
        )


def check_count(value: int, name: str) -> None:
    """Refuse anything but an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected an integer {name} >= 1; got {value!r}; pass a public number")
