# SPDX-License-Identifier: Apache-2.0
"""Steps of our own, by name, for the step checker: both APIs, several models, clippers, mechanisms and samplers."""

import itertools
import os
import tempfile
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, default_collate

from dpopt import (
    FlatClipper,
    GaussianMechanism,
    GroupGaussianMechanism,
    PoissonSampling,
    PrivacyEngine,
    PrivateTraining,
    per_layer,
)
from dpopt.audit.step_checks import TrainingStep

CLIP, SIGMA, RATE, EXPECTED, RECORDS = 2.0, 1.3, 0.25, 16.0, 64
_numbers = itertools.count()
# In memory where there is such a place: each charge waits for its disk.
_folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


def _ledger():
    return f"{_folder.name}/{os.getpid()}-{next(_numbers)}.jsonl"  # forks count alike


def vectors():
    source = torch.Generator().manual_seed(0)
    return [
        (3 * torch.randn(6, generator=source), int(torch.randint(0, 3, (1,), generator=source)))
        for _ in range(RECORDS)
    ]


def sentences():
    """Few different tokens, many times: what an embedding and its tied head add up."""
    source = torch.Generator().manual_seed(0)
    made = [torch.randint(0, 3, (6,), generator=source) for _ in range(RECORDS)]
    return [(x, x.roll(-1)) for x in made]


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x)))


class Averaging(nn.Module):
    """Keeps a running mean of what it saw, as batch normalisation does."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.nan_to_num(0, 0, 0).clamp(-9, 9).mean(0))
        return self.body(x)


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.body(x))))


def each(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def each_sentence(model, x, y):
    return F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").sum(1)


def explicit(
    model=mlp,
    records=vectors,
    losses=each,
    clipper=None,
    mechanism=GaussianMechanism,
    own_scales=False,
    part=None,
    **options,
):
    """PrivateTraining, on given batches."""

    def make(data, noise_multiplier):
        net = model()
        private = PrivateTraining(
            net,
            clipper=FlatClipper(CLIP) if clipper is None else clipper(net),
            mechanism=mechanism(noise_multiplier),
            sampling=PoissonSampling(RATE, EXPECTED),
            accountant_name="rdp",
            ledger=_ledger(),
            **options,
        )
        private.__enter__()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(batch):
            private.begin(private.draw(len(data)).number, len(batch))
            size = part or max(1, len(batch))
            for start in range(0, len(batch), size):
                private.accumulate(losses(net, *default_collate(batch[start : start + size])))
            private.release()
            optimizer.step()

        def batches():
            for batch in private.batches(data, steps=400):
                yield batch
                private.release()

        return net, step, batches(), private.__exit__

    claims = {} if own_scales else {"clip_norm": CLIP, "expected_batch_size": EXPECTED}
    return TrainingStep(make, records(), SIGMA, sampling_rate=RATE, **claims)


def familiar(model=mlp, loss=F.cross_entropy):
    """PrivacyEngine around an ordinary loop: each run takes its whole dataset as its first batch."""

    def make(data, noise_multiplier):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        engine = PrivacyEngine(accountant="rdp", ledger=_ledger())
        _, _, loader = engine.make_private(
            module=net, optimizer=optimizer, data_loader=DataLoader(list(data), batch_size=int(EXPECTED)),
            noise_multiplier=noise_multiplier, max_grad_norm=CLIP,
        )  # fmt: skip
        private = engine.training

        def step(batch):
            optimizer.zero_grad()
            private.begin(private.draw(len(data)).number, len(batch))
            if batch:
                loss(net(*(made := default_collate(batch))[:1]), made[1]).backward()
            optimizer.step()

        return net, step, loader, engine.detach

    return TrainingStep(make, vectors(), SIGMA, CLIP, EXPECTED)


def _each(z, y):
    return F.cross_entropy(z, y, reduction="none")


COUPLED = {
    "contrastive": lambda z, y: F.cross_entropy(z @ z.T, torch.arange(len(z))),
    "mean over tokens": lambda z, y: (w := (10 * z.detach().norm(dim=1)).floor() + 1) @ _each(z, y) / w.sum(),
    "weights of the batch": lambda z, y: ((w := z.detach().abs().sum(1)) / w.sum() * _each(z, y)).sum() * 5,
    "batch statistics": lambda z, y: F.cross_entropy(
        (z - z.mean(0)) / (z.var(0, unbiased=False) + 0.1).sqrt(), y
    ),
    "ranking": lambda z, y: 3 * torch.relu(1 + z[:, :1].T - z[:, 1:2]).mean(),
}

STEPS = {
    "explicit": explicit,
    "two parts": partial(explicit, part=3),
    "two passes": partial(explicit, two_pass=True),
    "per layer": partial(explicit, clipper=lambda net: per_layer(net, CLIP)),
    "group noise": partial(explicit, clipper=lambda net: per_layer(net, CLIP), mechanism=GroupGaussianMechanism, own_scales=True),
    "tied": partial(explicit, model=Tied, records=sentences, losses=each_sentence),
    "averaging": partial(explicit, model=Averaging),
    "batch norm": partial(explicit, model=Normalised),
    "secure": partial(explicit, randomness="secure"),
    "familiar": familiar,
    **{name: partial(familiar, loss=loss) for name, loss in COUPLED.items()},
}  # fmt: skip
