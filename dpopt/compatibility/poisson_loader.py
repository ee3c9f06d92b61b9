# SPDX-License-Identifier: Apache-2.0
"""Poisson loaders from elsewhere: recognised by `make_private`, which draws from their dataset anew.

`DPDataLoader` and `UniformWithReplacementSampler` have the names and arguments that Opacus gives them, for scripts that
make such a loader first. What they draw outside a run is for looking: no charge pays for it and no step may use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, Sampler

from dpopt.loader import PrivateDataLoader, check_loader


class UniformWithReplacementSampler(Sampler[list[int]]):
    """Batches of indices, in each of which every record takes part by a coin of its own.

    Args:
        num_samples: the number of records.
        sample_rate: the probability of each coin, in (0, 1].
        generator: where the coins come from (default: torch's own).
        steps: batches an epoch (default: the whole part of 1 / sample_rate).
    """

    def __init__(
        self,
        *,
        num_samples: int,
        sample_rate: float,
        generator: torch.Generator | None = None,
        steps: int | None = None,
    ) -> None:
        if num_samples < 1 or not 0 < sample_rate <= 1:
            raise ValueError(
                f"expected num_samples >= 1 and 0 < sample_rate <= 1; got {num_samples} and {sample_rate}; the rate is "
                "batch size / number of records"
            )
        self.num_samples = num_samples
        self.sample_rate = sample_rate
        self.generator = generator
        self.steps = int(1 / sample_rate + 1e-9) if steps is None else steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            drawn = (
                torch.rand(
                    self.num_samples,
                    generator=self.generator,
                    device=None if self.generator is None else self.generator.device,
                )
                < self.sample_rate
            )
            yield torch.nonzero(drawn).flatten().tolist()


class DPDataLoader(DataLoader[Any]):
    """A loader of Poisson batches over `dataset`, possibly empty ones. `make_private` makes a private one of it.

    `drop_last`, `batch_first` and `rand_on_empty` are there for scripts that pass them: a Poisson loader drops nothing,
    and only False is taken for the last.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        sample_rate: float,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        distributed: bool = False,
        batch_first: bool = True,
        rand_on_empty: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
    ) -> None:
        if distributed or rand_on_empty:
            raise ValueError(
                "expected distributed=False and rand_on_empty=False; got True: one process trains, and an example made up "
                "for an empty batch would be one that nobody accounts for; leave them out"
            )
        self.sample_rate = sample_rate
        num_records = len(dataset)  # pyright: ignore[reportArgumentType]
        super().__init__(
            dataset,
            batch_sampler=UniformWithReplacementSampler(
                num_samples=num_records, sample_rate=sample_rate, generator=generator
            ),
            collate_fn=_EmptyToo(collate_fn or torch.utils.data.default_collate, dataset),
            num_workers=num_workers,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            generator=generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
        )

    @classmethod
    def from_data_loader(
        cls,
        data_loader: DataLoader[Any],
        *,
        distributed: bool = False,
        generator: torch.Generator | None = None,
        batch_first: bool = True,
        rand_on_empty: bool = False,
    ) -> DPDataLoader:
        """One over the dataset of `data_loader`, at the rate 1 / its length."""
        return cls(
            data_loader.dataset,
            sample_rate=1 / len(data_loader),
            collate_fn=data_loader.collate_fn,
            generator=generator or data_loader.generator,
            distributed=distributed,
            batch_first=batch_first,
            rand_on_empty=rand_on_empty,
            num_workers=data_loader.num_workers,
            pin_memory=data_loader.pin_memory,
            timeout=data_loader.timeout,
            worker_init_fn=data_loader.worker_init_fn,
            multiprocessing_context=data_loader.multiprocessing_context,
            prefetch_factor=data_loader.prefetch_factor,
            persistent_workers=data_loader.persistent_workers,
        )


class _EmptyToo:
    """A collate function that also knows the empty batch: the structure of a full one, with 0 rows."""

    def __init__(self, collate: Callable[[list[Any]], Any], dataset: Dataset[Any]) -> None:
        self.collate = collate
        self.dataset = dataset

    def __call__(self, examples: list[Any]) -> Any:
        if examples:
            return self.collate(examples)
        return pytree.tree_map(_no_rows, self.collate([self.dataset[0]]))


def _no_rows(value: object) -> object:
    return value[:0] if isinstance(value, Tensor) and value.dim() > 0 else value


def check_records(loader: DataLoader[Any]) -> None:
    """Refuse a loader that Poisson draws from its whole dataset cannot replace."""
    if isinstance(loader, PrivateDataLoader) and loader.poisson.largest is not None:
        raise ValueError(
            "expected the loader that make_private returned, or one of your own; got the loader of physical batches of a "
            "BatchMemoryManager; pass the one that it was made of"
        )
    if not draws_poisson(loader):
        check_loader(loader)


def draws_poisson(loader: DataLoader[Any]) -> bool:
    """Whether `loader` draws all of its dataset by one coin a record: ours, a private one, or one of Opacus'."""
    batches: Any = loader.batch_sampler
    if isinstance(loader, PrivateDataLoader):
        return True
    # Known by its name: Opacus need not be installed.
    named = type(batches).__name__ == "UniformWithReplacementSampler"
    return named and getattr(batches, "num_samples", None) == len(loader.dataset)  # pyright: ignore
