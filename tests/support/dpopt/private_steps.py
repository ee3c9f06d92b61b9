# SPDX-License-Identifier: Apache-2.0
"""A private step in thirty lines of plain torch, right as it stands, with a switch for each way to get it wrong."""

import copy
import secrets

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate

from dpopt.audit.step_checks import TrainingStep

CLIP, EXPECTED, RATE = 1.0, 16.0, 0.25


def records(number=64, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, generator=source), int(torch.randint(0, 3, (1,), generator=source)))
        for _ in range(number)
    ]


class Small(nn.Module):
    def __init__(self, bug):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.5 if bug == "dropout" else 0.0)
        if bug in ("batch statistics", "buffer"):
            self.norm = nn.BatchNorm1d(8)
        self.bug = bug

    def forward(self, x):
        h = self.body(x)
        if self.bug == "batch statistics":
            h = self.norm(h)
        if self.bug == "buffer":  # follows the records, and normalises by nothing of them
            self.norm.running_mean.add_(0.1 * h.detach().nan_to_num(0, 0, 0).clamp(-9, 9).mean(0))
        return self.head(self.dropout(torch.tanh(h)))


def pairwise(logits, y):
    """Contrastive: each row's negatives are the other rows."""
    return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)), reduction="none")


LOSSES = {
    "contrastive": pairwise,
    "batch mean": lambda z, y: F.cross_entropy(z - z.mean(0, keepdim=True), y, reduction="none"),
    "weighted": lambda z, y: (w := z.detach().abs().sum(1)) / w.sum() * len(z) * F.cross_entropy(z, y, reduction="none") * 3,
    "ranking": lambda z, y: torch.relu(1 + z[:, :1].T - z[:, 1:2]).sum(1) * 3,
    "largest": lambda z, y: F.cross_entropy(z / z.detach().abs().amax(), y, reduction="none") * 9,
}  # fmt: skip


def losses_of(model, batch, bug):
    x, y = default_collate(batch)
    if bug in (*LOSSES, "batch statistics"):
        return LOSSES.get(bug, lambda z, y: F.cross_entropy(z, y, reduction="none"))(model(x), y)
    # Each by itself: in a shared graph 0 times a NaN of one row is a NaN in the gradient of every other.
    return [F.cross_entropy(model(one), label) for one, label in zip(x.split(1), y.split(1), strict=True)]


@torch.enable_grad()
def clipped_sum(model, batch, clip, bug):
    """By name; each example's own gradient, from a loss that may couple them."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = {n: torch.zeros_like(p) for n, p in zip(names, parameters, strict=True)}
    if not batch:
        return total
    whole = []
    for loss in losses_of(model, batch, bug):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        whole.append(
            [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        )
    if bug == "clip after the sum":
        whole = [[torch.stack(gs).sum(0) for gs in zip(*whole, strict=True)]]
    for gradient in whole:
        if bug == "each tensor":
            weights = [min(1.0, clip / (g.norm().item() + 1e-12)) for g in gradient]
        else:
            norm = torch.cat([g.flatten() for g in gradient]).norm().item()
            weights = [min(1.0, clip / (norm + 1e-12)) if bug != "no clipping" else 1.0] * len(gradient)
        for name, g, weight in zip(names, gradient, weights, strict=True):
            if bug == "not finite" or bool(torch.isfinite(torch.cat([v.flatten() for v in gradient])).all()):
                total[name] += weight * g
    return {n: v.bfloat16().float() for n, v in total.items()} if bug == "bfloat16" else total


def drawn(shape, bug, generator, number):
    """Noise of variance 1, of the law that the bug has."""
    if bug == "uniform":
        return (torch.rand(shape, generator=generator) - 0.5) * 12**0.5
    if bug == "laplace":
        return torch.distributions.Laplace(0.0, 0.5**0.5).sample(shape)
    if bug == "same every step":
        return torch.randn(shape, generator=torch.Generator().manual_seed(7 + number))
    if bug == "one number" and len(shape) > 1:
        return torch.randn(1, generator=generator).expand(shape)
    return torch.randn(shape, generator=generator)


def noised(total, sigma, bug, generator, step, size):
    std = (
        sigma
        * CLIP
        * {"halved": 0.5, "nine tenths": 0.9, "scaled by the draw": size / EXPECTED}.get(bug, 1.0)
    )
    shared = torch.randn(max(v.numel() for v in total.values()), generator=generator)
    for number, (name, value) in enumerate(total.items()):
        noise = drawn(value.shape, bug, generator, number)
        if bug == "same every tensor":
            noise = shared[: value.numel()].view(value.shape)
        if (bug, name) == ("one tensor bare", "head.bias") or (bug == "every other step" and step % 2):
            noise = torch.zeros(value.shape)
        if (bug, name) == ("one row bare", "head.weight"):
            noise[0] = 0
        value += std * noise
    return total


def private_step(bug="", loader=None, sigma=1.0, **claims):
    """The step, and what it claims; `bug` is one of the words above, and "" is right."""

    def make(data, noise_multiplier):
        model = Small(bug)
        generator = torch.Generator().manual_seed(
            torch.initial_seed() if bug == "seeded" else secrets.randbits(60)
        )
        count = iter(range(1 << 30))

        def step(batch):
            if bug == "skips empty" and not batch:
                raise ValueError("expected a batch")
            total = clipped_sum(model, batch, CLIP, bug)
            total = noised(total, noise_multiplier, bug, generator, next(count), len(batch))
            divisor = {"drawn size": max(1, len(batch)), "number of records": len(data) / 4}.get(
                bug, EXPECTED
            )
            for name, p in model.named_parameters():
                p.grad = total[name] / divisor
                with torch.no_grad():
                    p -= 0.1 * (
                        copy.copy(p.grad)
                        if bug != "moves bare"
                        else clipped_sum(model, batch, CLIP, bug)[name]
                    )

        return (model, step) if loader is None else (model, step, loader(data))

    claims = {"clip_norm": CLIP, "expected_batch_size": EXPECTED, "noise_multiplier": sigma, **claims}
    return TrainingStep(make, records(), sampling_rate=None if loader is None else RATE, **claims)
