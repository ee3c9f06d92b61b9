# SPDX-License-Identifier: Apache-2.0
"""The variants of a training step: non-private, dpopt, and peers.

A variant is a context manager that makes a task private and yields its step, a function without arguments.
Peers run under their own public interface; what one cannot run raises, and the caller reports why.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.models import Task, optimizer_for
from clipping import Clipper, FlatClipper, per_layer
from dpopt import GaussianMechanism, PoissonSampling, PrivateTraining

NOISE_MULTIPLIER = 1.0
CLIP_NORM = 1.0

Step = Callable[[], None]
Variant = Callable[[Task], AbstractContextManager[Step]]


@contextmanager
def non_private(task: Task) -> Iterator[Step]:
    """The mean of the per-example losses, backward, AdamW."""
    optimizer = optimizer_for(task.model)

    def step() -> None:
        task.losses(task.forward(task.model), task.labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    yield step


@contextmanager
def private_run(
    task: Task, clipper: Clipper, mechanism: GaussianMechanism, *, two_pass: bool = False
) -> Iterator[PrivateTraining]:
    """An open run of dpopt on `task`, its ledger on disk; sampling rate 1, so each draw is the whole batch."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        with PrivateTraining(
            task.model,
            clipper=clipper,
            mechanism=mechanism,
            sampling=PoissonSampling(1.0, task.batch_size),
            ledger=Path(folder) / "ledger.jsonl",
            two_pass=two_pass,
        ) as private:
            yield private


def _dpopt(task: Task, clipper: Clipper, *, two_pass: bool = False) -> Iterator[Step]:
    optimizer = optimizer_for(task.model)
    with private_run(task, clipper, GaussianMechanism(NOISE_MULTIPLIER), two_pass=two_pass) as private:
        batches = private.batches(range(task.batch_size), steps=1 << 60)

        def step() -> None:
            next(batches)
            private.accumulate(task.losses(task.forward(task.model), task.labels))
            private.release()
            optimizer.step()
            optimizer.zero_grad()

        yield step


@contextmanager
def dpopt_flat(task: Task) -> Iterator[Step]:
    """dpopt, flat clipping: draw, accumulate, charge on disk, noise, AdamW."""
    yield from _dpopt(task, FlatClipper(CLIP_NORM))


@contextmanager
def dpopt_per_layer(task: Task) -> Iterator[Step]:
    """dpopt, one clip norm for each layer."""
    yield from _dpopt(task, per_layer(task.model, CLIP_NORM))


@contextmanager
def dpopt_two_pass(task: Task) -> Iterator[Step]:
    """dpopt, flat clipping in two backwards: norms, then sums."""
    yield from _dpopt(task, FlatClipper(CLIP_NORM), two_pass=True)


class _Criterion:
    """Per-example losses with the `reduction` that Opacus' loss wrapper switches."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.reduction = "mean"

    def __call__(self, output: object, labels: Tensor) -> Tensor:
        losses = self.task.losses(output, labels)
        return losses if self.reduction == "none" else losses.mean()


def _opacus(task: Task, mode: str, *, expand: bool) -> Iterator[Step]:
    from opacus import PrivacyEngine

    task.model.train()
    examples = DataLoader(TensorDataset(torch.arange(task.batch_size)), batch_size=task.batch_size)
    made = PrivacyEngine().make_private(
        module=task.model,
        optimizer=optimizer_for(task.model),
        criterion=_Criterion(task),
        data_loader=examples,
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        poisson_sampling=False,  # the batch is given; sampling is not what is timed
        grad_sample_mode=mode,
    )
    model, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else _Criterion(task)

    def step() -> None:
        criterion(task.forward(model, expand=expand), task.labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield step
    finally:
        model.remove_hooks()


@contextmanager
def opacus_hooks(task: Task) -> Iterator[Step]:
    """Opacus, grad_sample_mode="hooks", the model as it is."""
    yield from _opacus(task, "hooks", expand=False)


@contextmanager
def opacus_hooks_expanded(task: Task) -> Iterator[Step]:
    """Opacus hooks with position ids passed in for each example."""
    yield from _opacus(task, "hooks", expand=True)


@contextmanager
def opacus_ghost(task: Task) -> Iterator[Step]:
    """Opacus, grad_sample_mode="ghost", the model as it is."""
    yield from _opacus(task, "ghost", expand=False)


@contextmanager
def opacus_ghost_expanded(task: Task) -> Iterator[Step]:
    """Opacus ghost with position ids passed in for each example."""
    yield from _opacus(task, "ghost", expand=True)


@contextmanager
def fast_dp(task: Task) -> Iterator[Step]:
    """fastDP, MixOpt, flat Abadi clipping, default origin parameters."""
    from fastDP import PrivacyEngine  # pyright: ignore[reportMissingImports]

    optimizer = optimizer_for(task.model)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = PrivacyEngine(
            task.model,
            batch_size=task.batch_size,
            sample_size=100 * task.batch_size,
            epochs=1,
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=CLIP_NORM,
            clipping_fn="Abadi",
            clipping_mode="MixOpt",
            clipping_style="all-layer",
        )
        engine.attach(optimizer)

    def step() -> None:
        task.losses(task.forward(task.model), task.labels).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        yield step
    finally:
        engine.detach()


@contextmanager
def opake(task: Task) -> Iterator[Step]:
    """Opake: per-example gradients by vmap, flat clipping, Gaussian noise; its functional interface, AdamW of torch."""
    from opake.dpsgd import clipped_grad, gaussian_noise  # pyright: ignore[reportMissingImports]
    from opake.functional import make_functional  # pyright: ignore[reportMissingImports]
    from opake.random import key  # pyright: ignore[reportMissingImports]

    optimizer = optimizer_for(task.model)
    call, _, frozen = make_functional(task.model, partition_trainable=True)
    trainable = {name: p for name, p in task.model.named_parameters() if p.requires_grad}
    names = list(task.inputs)

    def loss(values: dict[str, Tensor], label: Tensor, *inputs: Tensor) -> Tensor:
        rows = dict(zip(names, (x.unsqueeze(0) for x in inputs), strict=True))
        every = {**frozen, **values}
        output = call(every, rows["x"]) if "x" in rows else call(every, **rows)
        return task.losses(output, label.unsqueeze(0))[0]

    gradient, clipping = clipped_grad(
        loss, argnums=0, batch_argnums=tuple(range(1, 2 + len(names))), clipping_norm=CLIP_NORM
    )
    noise, state = gaussian_noise(noise_multiplier=NOISE_MULTIPLIER, key=key(0))

    def step() -> None:
        nonlocal clipping, state
        values = {name: p.detach() for name, p in trainable.items()}
        clipped, clipping = gradient(values, task.labels, *task.inputs.values(), state=clipping)
        noisy, state = noise(clipped, state)
        for name, value in noisy.pytree.items():
            trainable[name].grad = value / task.batch_size
        optimizer.step()
        optimizer.zero_grad()

    yield step


FLOOR = "non-private"
VARIANTS: dict[str, Variant] = {
    FLOOR: non_private,
    "dpopt flat": dpopt_flat,
    "dpopt per-layer": dpopt_per_layer,
    "opacus hooks": opacus_hooks,
    "opacus ghost": opacus_ghost,
}
WORKAROUNDS: dict[str, tuple[str, Variant]] = {
    "opacus hooks": ("opacus hooks, position ids passed in", opacus_hooks_expanded),
    "opacus ghost": ("opacus ghost, position ids passed in", opacus_ghost_expanded),
}
"""What to run beside a variant that fails on a model with broadcast position ids."""

if importlib.util.find_spec("fastDP") is not None:
    VARIANTS["fastDP"] = fast_dp
if importlib.util.find_spec("opake") is not None:
    VARIANTS["opake"] = opake

EVERY: dict[str, Variant] = {**VARIANTS, "dpopt two-pass": dpopt_two_pass, **dict(WORKAROUNDS.values())}
