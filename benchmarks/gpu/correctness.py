# SPDX-License-Identifier: Apache-2.0
"""Is what the device computes right? Kernels and whole steps against float64, before any time is taken.

Shapes: B examples.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu.steps import with_kernels
from benchmarks.models import Task, _class_losses, _gpt2, _language
from clipping import FlatClipper, kernels, per_layer
from dpopt import GaussianMechanism, PoissonSampling, PrivateTraining

TOLERANCE = {"fp32": 2e-4, "bf16": 5e-2}
"""Largest relative difference of a clipped sum from the same in float64: rounding of the forward, mostly."""


@dataclass(frozen=True)
class Verdict:
    """One check: its largest relative error, and whether that is within what the dtype allows."""

    name: str
    error: float
    right: bool


def _mlp() -> Task:
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 7))
    return Task(model, {"x": torch.randn(9, 20)}, torch.arange(9) % 7, _class_losses)


def _cnn() -> Task:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 7),
    )  # fmt: skip
    return Task(model, {"x": torch.randn(6, 3, 16, 16)}, torch.arange(6) % 7, _class_losses)


class _Last(nn.Module):
    """A recurrent layer, and a head on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def _lstm() -> Task:
    return Task(_Last(), {"x": torch.randn(5, 11, 8)}, torch.arange(5) % 7, _class_losses)


def _tied() -> Task:
    model = _gpt2(n_layer=2, n_head=2, n_embd=64, vocab_size=128, n_positions=48)
    return _language(model, 6, 48, positions=False)


MODELS: dict[str, Callable[[], Task]] = {"mlp": _mlp, "cnn": _cnn, "lstm": _lstm, "gpt2, head tied": _tied}


def _rows(task: Task, chosen: slice) -> Task:
    cut = {name: x[chosen] for name, x in task.inputs.items()}
    return Task(task.model, cut, task.labels[chosen], task.losses)


def expected(task: Task, clip_norm: float, *, layered: bool) -> dict[str, Tensor]:
    """The clipped sum in float64 on the CPU, by a loop of autograd over single examples."""
    wide = {n: x.double() if x.is_floating_point() else x for n, x in task.inputs.items()}
    task = Task(copy.deepcopy(task.model).double(), wide, task.labels, task.losses)
    parameters = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
    groups = [list(parameters)]
    if layered:
        groups = [list(names) for names in per_layer(task.model, clip_norm).groups(list(parameters))]
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    bound = clip_norm / len(groups) ** 0.5 if layered else clip_norm
    for i in range(task.batch_size):
        one = _rows(task, slice(i, i + 1))
        losses = one.losses(one.forward(one.model), one.labels)
        grads = dict(
            zip(parameters, torch.autograd.grad(losses.sum(), list(parameters.values())), strict=True)
        )
        for names in groups:
            norm = torch.stack([grads[n].norm() for n in names]).norm().item()
            for name in names:
                total[name] += grads[name] * min(1.0, bound / max(norm, 1e-300))
    return total


def released(task: Task, clip_norm: float, *, layered: bool) -> dict[str, Tensor]:
    """The same by a step of the library, without noise."""
    clipper = per_layer(task.model, clip_norm) if layered else FlatClipper(clip_norm)
    size = task.batch_size
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        with PrivateTraining(
            task.model, clipper=clipper, mechanism=GaussianMechanism(0.0), sampling=PoissonSampling(1.0, size),
            ledger=Path(folder) / "ledger.jsonl",
        ) as private:  # fmt: skip
            for _ in private.batches(range(size), steps=1):
                private.accumulate(task.losses(task.forward(task.model), task.labels))
                private.release()
    named = task.model.named_parameters()
    return {name: p.grad * size for name, p in named if p.requires_grad and p.grad is not None}


def _error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    missing = set(wanted) - set(found)
    if missing:
        return float("inf")
    wide = {name: value.detach().double().cpu() for name, value in found.items()}
    apart = sum(float((wide[name] - wanted[name]).square().sum()) for name in wanted)
    return (apart / sum(float(x.square().sum()) for x in wanted.values())) ** 0.5


def engine_verdicts(device: str) -> list[Verdict]:
    """Every model under flat and per-layer clipping, fp32 and bf16 autocast, with kernels and without."""
    verdicts = []
    fused = (False, True) if device == "cuda" and kernels.trusted(device) else (False,)
    for name, build in MODELS.items():
        torch.manual_seed(0)
        task = build()
        for layered in (False, True):
            wanted = expected(task, 0.5, layered=layered)
            for dtype, autocast in (("fp32", None), ("bf16", torch.bfloat16)):
                for use in fused:
                    moved = Task(copy.deepcopy(task.model), task.inputs, task.labels, task.losses)
                    with with_kernels(use):
                        found = released(moved.on(device, autocast), 0.5, layered=layered)
                    error = _error(found, wanted)
                    how = f"{'per-layer' if layered else 'flat'}, {dtype}{', kernels' if use else ''}"
                    verdicts.append(Verdict(f"{name}, {how}", error, error <= TOLERANCE[dtype]))
    return verdicts


def kernel_verdict(device: str) -> Verdict | None:
    """Whether every Triton kernel agrees with float64 on this device; None where there are none."""
    if not kernels.available(device):
        return None
    right = kernels.trusted(device)
    return Verdict("Triton kernels: norms, sums, noise", 0.0 if right else float("nan"), right)
