# SPDX-License-Identifier: Apache-2.0
"""The data loader of the familiar door: Poisson batches, drawn from secret randomness, counted as they are used."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from dpopt.training import PrivateTraining

STAND_IN = (0,)
"""What is handed out for a draw that holds nobody: the first record, which then adds nothing."""


class Part(NamedTuple):
    """A physical batch: `size` of the rows handed out for a draw, the `first` or the `last` of its parts.

    `blank` says that nobody was drawn, and that `rows` stand in.
    """

    draw: int
    size: int
    rows: tuple[int, ...]
    blank: bool
    first: bool
    last: bool


class PoissonBatches(Sampler[list[int]]):
    """`num_batches` draws an epoch of the run's sampler, each in parts of at most `largest` examples.

    No batch is empty, as little code of models and collate functions knows an empty one: see `StepSum.blank`.
    `parts` describes what the newest iterator has given out, in order: workers fetch ahead of the loop.
    """

    def __init__(
        self, training: PrivateTraining, num_records: int, num_batches: int, largest: int | None = None
    ) -> None:
        self.training = training
        self.num_records = num_records
        self.num_batches = num_batches
        self.largest = largest
        self.parts: deque[Part] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        """Draw the batches of one epoch."""
        self.parts = deque()
        return self._draws(self.parts)

    def _draws(self, parts: deque[Part]) -> Iterator[list[int]]:
        for _ in range(self.num_batches):
            indices, number = self.training.draw(self.num_records)
            rows = tuple(indices) or STAND_IN
            size = self.largest or len(rows)
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                last = start + size >= len(rows)
                parts.append(Part(number, len(part), rows, not indices, start == 0, last))
                yield list(part)

    def __len__(self) -> int:
        """Draws an epoch; cut into parts, about how many parts, as Opacus tells it: a public number."""
        if self.largest is None:
            return self.num_batches
        sampling = self.training.sampling
        rate = getattr(sampling, "sampling_rate", sampling.expected_batch_size / self.num_records)
        return math.ceil(self.num_batches * (rate * self.num_records / self.largest))


class PrivateDataLoader(DataLoader[Any]):
    """A torch DataLoader over Poisson batches that opens a private step with each draw it hands out.

    Under `torch.no_grad()` it only hands out batches: nothing can be released from them. `accelerator.prepare` leaves it
    as it is, since a copy would not tell which draw is in the loop: move its batches to the device in the loop.
    """

    _is_accelerate_prepared = True

    def __iter__(self) -> Any:
        """Yield batches; each is one step's draw, or a part of it."""
        batches = self.poisson
        step = batches.training.sum
        iterator = super().__iter__()
        parts = batches.parts
        for batch in iterator:
            if batches.parts is not parts:
                raise RuntimeError(
                    "expected one iterator over the private loader at a time; got a batch asked of an older one; "
                    "finish a loop before the next, and evaluate on a loader of your own"
                )
            part = parts.popleft()
            if torch.is_grad_enabled():
                if part.first:
                    batches.training.begin(part.draw, len(part.rows), part.rows)
                step.hold, step.num_part, step.blank = not part.last, part.size, part.blank
                if step.checks is not None:
                    step.checks.hand_out(batch, part.size, first=part.first)
            yield batch
            if part.last and step.admission.num_drawn is not None:
                raise RuntimeError(
                    "expected step() of the private optimizer on every drawn batch; got the next request before it; two draws "
                    "in one step are not one Poisson draw, and skipping a step because of what was drawn would itself tell about the "
                    "data; in place of gradient accumulation over batches (gradient_accumulation_steps=1) give the loader "
                    "a larger batch_size, and call backward() on parts of each batch before one step(), or cut it with "
                    "BatchMemoryManager; wrap a loop that only looks in torch.no_grad()"
                )

    @property
    def poisson(self) -> PoissonBatches:
        """The sampler behind this loader."""
        batches = self.batch_sampler
        assert isinstance(batches, PoissonBatches)
        return batches


def check_loader(loader: DataLoader[Any]) -> None:
    """Refuse a loader that Poisson sampling of its whole dataset cannot replace."""
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"expected a data loader over a dataset with a length and indices; got {type(dataset).__name__}, which "
            "Poisson sampling cannot draw from; load the records into a map-style dataset"
        )
    sampler = loader.sampler
    whole = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(dataset)
    )
    if type(loader.batch_sampler) is not BatchSampler or not whole:
        raise ValueError(
            "expected a data loader with a batch size and the plain sequential or shuffled order; got sampler "
            f"{type(sampler).__name__} and batch sampler {type(loader.batch_sampler).__name__}, which Poisson "
            "sampling would replace; choose the records with torch.utils.data.Subset instead"
        )
    if type(loader).__iter__ not in (DataLoader.__iter__, PrivateDataLoader.__iter__):
        raise ValueError(
            f"expected a data loader that iterates as torch's does; got {type(loader).__name__}, whose own __iter__ "
            "batches of a Poisson draw would not pass; give make_private a plain DataLoader, before accelerator.prepare, "
            "and do that work in its collate_fn or in the loop"
        )
    if len(loader) == 0:
        raise ValueError(
            "expected at least one batch an epoch; got a data loader of length 0, which gives no sampling rate; add "
            "records, lower the batch size or leave out drop_last"
        )


def private_loader(
    loader: DataLoader[Any], training: PrivateTraining, *, largest: int | None = None
) -> PrivateDataLoader:
    """`loader` with its batches replaced by Poisson draws; collate function and workers stay as they are."""
    num_records = len(loader.dataset)  # pyright: ignore[reportArgumentType]
    return PrivateDataLoader(
        training.joined(loader.dataset),  # pyright: ignore[reportArgumentType]
        batch_sampler=PoissonBatches(training, num_records, _epoch(training, loader), largest),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def _epoch(training: PrivateTraining, loader: DataLoader[Any]) -> int:
    length = training.sampling.steps_per_charge
    return length if length > 1 else len(loader)


class BatchMemoryManager:
    """Cuts each logical batch of a private loader into physical ones, shaped like Opacus' manager.

        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as small:
            for batch in small:
                ...  # the ordinary loop; optimizer.step() acts on the last physical batch of each logical one

    Before the last part the parameters have no gradient, so torch optimizers leave them as they are. The cut is
    made before collating, so any collate function serves.
    """

    def __init__(
        self,
        *,
        data_loader: DataLoader[Any],
        max_physical_batch_size: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if not isinstance(data_loader, PrivateDataLoader):
            raise ValueError(
                f"expected the data loader that make_private returned; got {type(data_loader).__name__}; make the "
                "model private first"
            )
        if max_physical_batch_size < 1:
            raise ValueError(
                f"expected max_physical_batch_size >= 1; got {max_physical_batch_size}; it is the number of "
                "examples that fit in memory at once"
            )
        self.training = data_loader.poisson.training
        self.loader = private_loader(data_loader, self.training, largest=max_physical_batch_size)
        self.optimizer = optimizer

    def __enter__(self) -> PrivateDataLoader:
        """Return the loader of physical batches; its length is about their number: the drawn one is secret."""
        return self.loader

    def __exit__(self, *_: object) -> None:
        """Drop what an interrupted logical batch left."""
        self.training.sum.end()
