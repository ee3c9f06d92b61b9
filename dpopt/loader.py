# SPDX-License-Identifier: Apache-2.0
"""The data loader of the familiar door: Poisson batches, drawn from secret randomness, counted as they are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from dpopt.training import PrivateTraining


class PoissonBatches(Sampler[list[int]]):
    """`num_batches` independent Poisson draws an epoch; notes each draw's size for the loader."""

    def __init__(self, training: PrivateTraining, num_records: int, num_batches: int) -> None:
        self.training = training
        self.num_records = num_records
        self.num_batches = num_batches
        self.sizes: deque[int] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        """Draw the batches of one epoch."""
        self.sizes.clear()
        for _ in range(self.num_batches):
            indices = self.training.draw(self.num_records)
            self.sizes.append(len(indices))
            yield indices

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.num_batches


class CollateWithEmpty:
    """A collate function that also knows the empty batch: the structure of a full one, with 0 rows."""

    def __init__(self, collate: Callable[[list[Any]], Any], dataset: Dataset[Any]) -> None:
        self.collate = collate
        self.dataset = dataset

    def __call__(self, examples: list[Any]) -> Any:
        """Collate `examples`."""
        if examples:
            return self.collate(examples)
        # Only shapes and dtypes of this example are used; its values are cut off.
        return pytree.tree_map(_no_rows, self.collate([self.dataset[0]]))


def _no_rows(value: object) -> object:
    return value[:0] if isinstance(value, Tensor) and value.dim() > 0 else value


class PrivateDataLoader(DataLoader[Any]):
    """A torch DataLoader over Poisson batches that opens a private step with each batch it hands out."""

    def __iter__(self) -> Any:
        """Yield batches; each is one step's draw."""
        batches = self.batch_sampler
        assert isinstance(batches, PoissonBatches)
        for batch in super().__iter__():
            batches.training.sum.begin(batches.sizes.popleft())
            yield batch


def check_loader(loader: DataLoader[Any]) -> None:
    """Refuse a loader whose dataset cannot be sampled by index."""
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"expected a data loader over a dataset with a length and indices; got {type(dataset).__name__}, which "
            "Poisson sampling cannot draw from; load the records into a map-style dataset"
        )


def private_loader(loader: DataLoader[Any], training: PrivateTraining) -> PrivateDataLoader:
    """`loader` with its batches replaced by Poisson draws; collate function and workers stay as they are."""
    num_records = len(loader.dataset)  # pyright: ignore[reportArgumentType]
    return PrivateDataLoader(
        loader.dataset,
        batch_sampler=PoissonBatches(training, num_records, len(loader)),
        collate_fn=CollateWithEmpty(loader.collate_fn, loader.dataset),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class BatchMemoryManager:
    """Cuts each logical batch of a private loader into physical ones, shaped like Opacus' manager.

        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as small:
            for batch in small:
                ...  # the ordinary loop; optimizer.step() acts on the last physical batch of each logical one

    Before the last part the parameters have no gradient, so torch optimizers leave them as they are.
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
        self.loader = data_loader
        self.size = max_physical_batch_size
        self.optimizer = optimizer

    def __enter__(self) -> BatchMemoryManager:
        """Return an iterable of physical batches."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what an interrupted logical batch left."""
        batches = self.loader.batch_sampler
        assert isinstance(batches, PoissonBatches)
        batches.training.sum.hold = False
        if batches.training.sum.num_added:
            batches.training.sum.end()

    def __iter__(self) -> Iterator[Any]:
        """Yield physical batches, at least one for each logical batch."""
        batches = self.loader.batch_sampler
        assert isinstance(batches, PoissonBatches)
        step = batches.training.sum
        for batch in self.loader:
            num_examples = step.num_drawn or 0
            for start in range(0, max(1, num_examples), self.size):
                step.hold = start + self.size < num_examples
                yield _physical(batch, slice(start, start + self.size), num_examples)


def _physical(batch: Any, part: slice, num_examples: int) -> Any:
    def cut(value: object) -> object:
        batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == num_examples
        return value[part] if isinstance(value, Tensor) and batched else value

    return pytree.tree_map(cut, batch)
