# SPDX-License-Identifier: Apache-2.0
"""What is checked: a training step that anybody can describe in ten lines, and how one of its runs is repeated.

All randomness that a script can seed is seeded here (torch, numpy, random), so that two runs differ by their
records alone. A step with noise of its own secret generator is seen without noise at noise multiplier 0.
"""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

SAMPLERS = ("poisson", "fixed-size", "shuffled")


class Run(NamedTuple):
    """What `make` returns, or a plain tuple of the same: a model, its private step, and if wanted its loader."""

    model: nn.Module
    step: Callable[[list[Any]], object]
    """One private step on exactly these records, possibly none; afterwards `.grad` holds what was released."""
    batches: Iterable[Any] | None = None
    """The loader that training would go through; it is only iterated, to see which records it takes."""
    close: Callable[[], object] | None = None
    """Called when the run is no longer needed."""


class Make(Protocol):
    """Builds a run from nothing."""

    def __call__(self, records: Sequence[Any], noise_multiplier: float, /) -> tuple[Any, ...]:
        """A fresh model and its private step over the dataset `records`; without noise where it is 0."""
        ...


@dataclass(frozen=True)
class TrainingStep:
    """A training step and what it claims.

    The claim that is always checked: one record moves what a step releases by at most 1 / `noise_multiplier` standard
    deviations of its noise. The other numbers are optional and make checks exact, or possible at all.

    Args:
        make: `make(records, noise_multiplier)` returns (model, step) or (model, step, loader), freshly built.
        records: at least 4 ordinary records, each as the dataset would return it.
        noise_multiplier: what the accountant is told, > 0.
        clip_norm: the most that one record may add to the sum, of all groups together. Leave it out where tensors have
            noise of their own scale.
        expected_batch_size: what the noisy sum is divided by, with `clip_norm`; 1 where it is not divided.
        sampling_rate: with a loader: the rate at which the accountant is told that each record takes part.
        sampler: what the accountant is told, "poisson", "fixed-size" or "shuffled".
        batch_size: where every batch holds exactly so many records, and the step takes no others: records are then
            replaced and never removed, which may move the release twice as far.
        hostile: further records that may be in somebody's dataset: very long, empty, badly labelled.
        workers: `workers(noise_multiplier)` returns what several ranks or clients run, each as (model, step);
            all of their releases are published.

            def make(records, noise_multiplier):
                model = nn.Linear(8, 4)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                loader = DataLoader(records, batch_size=16)
                model, optimizer, loader = PrivacyEngine().make_private(
                    module=model, optimizer=optimizer, data_loader=loader,
                    noise_multiplier=noise_multiplier, max_grad_norm=1.0)

                def step(batch):
                    x, y = default_collate(batch)
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()

                return model, step, loader

            my_step = TrainingStep(make, records, noise_multiplier=1.0)
    """

    make: Make
    records: Sequence[Any]
    noise_multiplier: float
    clip_norm: float | None = None
    expected_batch_size: float | None = None
    sampling_rate: float | None = None
    sampler: str = "poisson"
    batch_size: int | None = None
    hostile: Sequence[Any] = ()
    workers: Callable[[float], Sequence[tuple[Any, ...]]] | None = None

    def __post_init__(self) -> None:
        if len(self.records) < 4:
            raise ValueError("expected at least 4 records; got fewer; give some ordinary ones of the dataset")
        if not self.noise_multiplier > 0:
            raise ValueError(
                f"expected noise_multiplier > 0; got {self.noise_multiplier}; give the one that the accountant is told"
            )
        if (self.clip_norm is None) != (self.expected_batch_size is None):
            raise ValueError(
                "expected clip_norm and expected_batch_size together; got one of them; give both (expected_batch_size=1 "
                "for a sum that is not divided) or neither"
            )
        if self.sampler not in SAMPLERS:
            raise ValueError(
                f"expected a sampler out of {SAMPLERS}; got {self.sampler!r}; name what is priced"
            )

    @property
    def batch(self) -> list[Any]:
        """A few ordinary records: the batch of checks that need just one."""
        size = self.batch_size or 4
        return [self.records[i % len(self.records)] for i in range(size)]

    @property
    def noise_std(self) -> float | None:
        """The standard deviation of the noise in what is released, as claimed; None where it is not."""
        if self.clip_norm is None or self.expected_batch_size is None:
            return None
        return self.noise_multiplier * self.clip_norm / self.expected_batch_size


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Everything that a script can seed, seeded; as it was, afterwards. What the step says meanwhile is not shown."""
    quiet = io.StringIO()
    before = random.getstate(), np.random.get_state()
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        redirect_stdout(quiet),
        redirect_stderr(quiet),
    ):
        warnings.simplefilter("ignore")
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def running(made: tuple[Any, ...]) -> Iterator[Run]:
    """A run as a user returned it, closed in the end."""
    run = Run(*made)
    try:
        yield run
    finally:
        if run.close is not None:
            run.close()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a step is expected to release, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """What was released, flat and in float64; parameters without a gradient are left out."""
    found = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
    return {n: g.detach().to_dense().double().flatten().clone() for n, g in found.items()}


def resolution(model: nn.Module) -> float:
    """The machine epsilon of the coarsest gradient: what is released is rounded to it, after the noise."""
    kinds = {p.dtype if p.grad is None else p.grad.dtype for p in trainable(model).values()}
    return max((torch.finfo(kind).eps for kind in kinds), default=torch.finfo(torch.float32).eps)


def released(
    case: TrainingStep,
    batch: list[Any],
    *,
    noise_multiplier: float,
    seed: int,
    records: Sequence[Any] | None = None,
) -> dict[str, Tensor]:
    """What a fresh run releases in its first step on `batch`, built and run from `seed`."""
    with (
        seeded(seed),
        running(case.make(case.records if records is None else records, noise_multiplier)) as run,
    ):
        run.step(batch)
        return gradients(run.model)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Everything that `state_dict` would publish, and every parameter."""
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    return {name: v.detach().clone() for name, v in {**state, **dict(model.named_parameters())}.items()}


def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the model's tensors back to what they were, in place."""
    with torch.no_grad():
        for name, value in {**model.state_dict(), **dict(model.named_parameters())}.items():
            if isinstance(value, Tensor):
                value.copy_(state[name])
