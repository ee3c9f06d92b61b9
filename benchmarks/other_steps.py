# SPDX-License-Identifier: Apache-2.0
"""Training steps of other libraries, as their own documentation shows them, for `dpopt audit step`.

dpopt audit step benchmarks.other_steps:opacus_hooks

Besides Opacus: deepee 0.1.9 and pyvacy 0.0.32 (`pip download --no-deps`, unpacked somewhere on PYTHONPATH) and opake 0.16.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, default_collate

from dpopt.audit.step_checks import TrainingStep

BATCH, SIGMA, CLIP = 16, 1.0, 1.0


def records(number: int = 64) -> list[tuple[torch.Tensor, int]]:
    source = torch.Generator().manual_seed(0)
    return [
        (2 * torch.randn(6, generator=source), int(torch.randint(0, 3, (1,), generator=source)))
        for _ in range(number)
    ]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def contrastive(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each row against the other rows of the batch: a coupled loss, which no per-example clipping makes private."""
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


def _collated(batch: list[Any]) -> list[torch.Tensor]:
    return default_collate(batch) if batch else [torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)]


def _opacus(
    mode: str = "hooks",
    per_layer: bool = False,
    poisson: bool = True,
    loss: Any = F.cross_entropy,
    sampler: str = "poisson",
) -> TrainingStep:
    from opacus import PrivacyEngine

    def make(data: Any, noise_multiplier: float) -> tuple[Any, ...]:
        net = mlp()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        options = {"clipping": "per_layer"} if per_layer else {}
        made = PrivacyEngine().make_private(
            module=net, optimizer=optimizer, criterion=nn.CrossEntropyLoss(),
            data_loader=DataLoader(data, batch_size=BATCH, shuffle=True), noise_multiplier=noise_multiplier,
            max_grad_norm=[CLIP / 2] * 4 if per_layer else CLIP, grad_sample_mode=mode, poisson_sampling=poisson, **options,
        )  # fmt: skip
        private, optimizer, loader = made[0], made[1], made[-1]
        criterion = made[2] if mode == "ghost" else loss

        def step(batch: list[Any]) -> None:
            x, y = _collated(batch)
            optimizer.zero_grad()
            criterion(private(x), y).backward()
            optimizer.step()

        return net, step, loader

    return TrainingStep(make, records(), SIGMA, CLIP, BATCH, sampling_rate=0.25, sampler=sampler)


opacus_hooks = _opacus
opacus_ghost = partial(_opacus, "ghost")
opacus_functorch = partial(_opacus, "functorch")
opacus_per_layer = partial(_opacus, per_layer=True)
opacus_contrastive = partial(_opacus, loss=contrastive)
opacus_shuffled = partial(_opacus, poisson=False)


def _deepee(seed: int | None = None) -> TrainingStep:
    from deepee import PrivacyWrapper, UniformDataLoader  # pyright: ignore[reportMissingImports]

    def make(data: Any, noise_multiplier: float) -> tuple[Any, ...]:
        net = mlp()
        private = PrivacyWrapper(net, BATCH, CLIP, noise_multiplier, seed=seed)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(batch: list[Any]) -> None:
            x, y = default_collate(batch)
            private.zero_grad()
            # Torch's own parallel_apply asks for an accelerator, which it has not had to when this was written.
            with mock.patch(
                "torch.nn.parallel.parallel_apply",
                lambda nets, rows: [n(r) for n, r in zip(nets, rows, strict=True)],
            ):
                outputs = private(x)
            F.cross_entropy(outputs, y, reduction="sum").backward()
            private.clip_and_accumulate()
            private.noise_gradient()
            optimizer.step()
            private.prepare_next_batch()

        return net, step, UniformDataLoader(data, BATCH, pin_memory=False)

    return TrainingStep(
        make, records(), SIGMA, CLIP, BATCH, sampling_rate=0.25, sampler="fixed-size", batch_size=BATCH
    )


deepee_plain = _deepee
deepee_seeded = partial(_deepee, seed=7)


def pyvacy_plain() -> TrainingStep:
    """As in its README: an ordinary loop with DPSGD in the place of SGD."""
    from pyvacy.optim import DPSGD  # pyright: ignore[reportMissingImports]

    def make(data: Any, noise_multiplier: float) -> tuple[Any, ...]:
        net = mlp()
        optimizer = DPSGD(CLIP, max(noise_multiplier, 1e-30), BATCH, net.parameters(), lr=0.1)

        def step(batch: list[Any]) -> None:
            x, y = default_collate(batch)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

        return net, step, DataLoader(data, batch_size=BATCH, shuffle=True)

    # Its accountant prices sampling at batch_size / N, by the moments of Poisson sampling.
    return TrainingStep(make, records(), SIGMA, sampling_rate=0.25)


def _opake(secret: bool = True) -> TrainingStep:
    """As in its README: clipped_grad and gaussian_noise, normalised by the expected batch size; the README's key is 42."""
    from opake.dpsgd.clipping import clipped_grad  # pyright: ignore[reportMissingImports]
    from opake.dpsgd.noise import gaussian_noise  # pyright: ignore[reportMissingImports]
    from opake.random import key  # pyright: ignore[reportMissingImports]

    def make(data: Any, noise_multiplier: float) -> tuple[Any, ...]:
        net = mlp()
        state = {name: p.detach() for name, p in net.named_parameters()}

        def loss(parameters: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            outputs = torch.func.functional_call(net, parameters, (x[None],))
            return F.cross_entropy(outputs, y[None])

        grads, clipping = clipped_grad(loss, clipping_norm=CLIP, batch_argnums=(1, 2), normalize_by=BATCH)
        noise, drawing = (
            gaussian_noise(noise_multiplier=noise_multiplier, key=key(secrets.randbits(60) if secret else 42))
            if noise_multiplier
            else (None, None)
        )

        def step(batch: list[Any]) -> None:
            nonlocal clipping, drawing
            x, y = _collated(batch)
            found, clipping = grads(state, x, y, state=clipping)
            if noise is not None:
                found, drawing = noise(found, drawing)
            for name, p in net.named_parameters():
                p.grad = found.pytree[name].detach().clone()

        return net, step

    return TrainingStep(make, records(), SIGMA, CLIP, BATCH)


opake_plain = _opake
opake_readme = partial(_opake, secret=False)

STEPS = {
    "opacus_hooks": ("Opacus 1.6.0, hooks", opacus_hooks),
    "opacus_functorch": ("Opacus 1.6.0, functorch", opacus_functorch),
    "opacus_ghost": ("Opacus 1.6.0, ghost", opacus_ghost),
    "opacus_per_layer": ("Opacus 1.6.0, per layer", opacus_per_layer),
    "opacus_contrastive": ("Opacus 1.6.0, hooks, a contrastive loss", opacus_contrastive),
    "opacus_shuffled": ("Opacus 1.6.0, poisson_sampling=False, priced as Poisson", opacus_shuffled),
    "deepee_plain": ("deepee 0.1.9", deepee_plain),
    "deepee_seeded": ("deepee 0.1.9, seed=7", deepee_seeded),
    "pyvacy_plain": ("pyvacy 0.0.32", pyvacy_plain),
    "opake_plain": ("opake 0.16.1, a secret key", opake_plain),
    "opake_readme": ("opake 0.16.1, key(42) as in its README", opake_readme),
}
