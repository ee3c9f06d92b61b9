# SPDX-License-Identifier: Apache-2.0
"""Runs of an estimator, and the estimators written down again on dense gradients, one row for each example.

A reference is made with the clip norm C, the public divisor B, and its own numbers. `step(t, rows, records, again)`
returns the gradient of step t from `rows` (B, P), the gradients of the examples at the parameters as they are;
`records` tells which they are, and `again(values)` gives their gradients at other parameters (P,).

Shapes: B examples, P numbers of the model.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from dpopt import GaussianMechanism, PoissonSampling, PrivateTraining
from dpopt.estimators import Run, named_estimator
from tests.support.dpopt.private_runs import D, K, losses_of


class Tied(nn.Module):
    """An embedding whose table is the head's weight, and a norm: three kinds of gradients, one of them a sum."""

    def __init__(self, vocabulary=7, width=4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.norm(self.embed(tokens))))


def tied():
    torch.manual_seed(3)
    return Tied().double()


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, K)).double()


def tokens(num):
    rows = torch.randint(0, 7, (num, 3), generator=torch.Generator().manual_seed(4))
    return [(row, row.roll(-1)) for row in rows]


def vectors(num):
    generator = torch.Generator().manual_seed(2)
    inputs = 3 * torch.randn(num, D, generator=generator, dtype=torch.float64)
    return list(zip(inputs, torch.randint(0, K, (num,), generator=generator), strict=True))


def token_losses(model, batch):
    inputs, labels = (torch.stack(column) for column in zip(*batch, strict=True))
    return F.cross_entropy(model(inputs).transpose(1, 2), labels, reduction="none").sum(1)


SUBJECTS = {"mlp": (mlp, vectors, losses_of), "tied": (tied, tokens, token_losses)}


def flat(values):
    return torch.cat([value.detach().reshape(-1) for value in values])


def gradient_of(model):
    return flat([p.grad for p in model.parameters()])


def rows_of(model, batch, losses, values=None):
    """(B, P): the gradient of each example by itself, at the parameters `values` (P,), default: as they are."""
    model = copy.deepcopy(model)
    if values is not None:
        nn.utils.vector_to_parameters(values, model.parameters())
    rows = []
    for example in batch:
        model.zero_grad()
        losses(model, [example]).sum().backward()
        # a parameter that an example does not reach has the gradient 0
        rows.append(flat([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]))
    size = sum(p.numel() for p in model.parameters())
    return torch.stack(rows) if rows else torch.zeros(0, size, dtype=torch.float64)


def opened(model, estimator, *, clip=0.5, num=8, rate=1.0, noise=0.0, ledger=None, **options):
    """A run on `num` records, by the name of an estimator or with one that is made."""
    sampling = options.pop("sampling", PoissonSampling(rate, rate * num))
    if isinstance(estimator, str):
        estimator = named_estimator(estimator, Run(model, clip, num, sampling))
    return PrivateTraining(
        model,
        estimator=estimator,
        mechanism=options.pop("mechanism", GaussianMechanism(noise)),
        sampling=sampling,
        ledger=ledger,
        accountant_name=options.pop("accountant_name", "rdp"),
        **{"insecure_seed": 1, **options},
    )


def collect(private, model, losses, batch, size=100):
    """All parts of a batch, at most `size` examples each."""
    for part in batch.parts(size):
        private.evaluate(lambda p=part: losses(model, p.examples), records=part.indices)


# -- the references -------------------------------------------------------------------------------------------


def clip(rows, bound):
    return rows * (bound / rows.norm(dim=1, keepdim=True)).clamp_max(1)


class Weighted:
    """Plain clipping with one weight for each norm, in groups of equal shares."""

    def __init__(self, clip_norm, divisor, weight, groups=None):
        self.clip_norm, self.divisor, self.weight, self.groups = clip_norm, divisor, weight, groups

    def step(self, t, rows, records, again):
        groups = [range(rows.shape[1])] if self.groups is None else self.groups
        total, bound = torch.zeros(rows.shape[1]).double(), self.clip_norm / math.sqrt(len(groups))
        for group in groups:
            part = rows[:, list(group)]
            total[list(group)] = (self.weight(part.norm(dim=1), bound).unsqueeze(1) * part).sum(0)
        return total / self.divisor


def by_clipping(norms, bound):
    return (bound / norms).clamp_max(1)


def automatic(norms, bound):
    return bound / (norms + 0.01)


def psac(norms, bound):
    return bound / (norms + 0.1 / (norms + 0.1))


class Schedule:
    def __init__(self, clip_norm, divisor, steps, end):
        self.clip_norm, self.divisor, self.steps, self.end = clip_norm, divisor, steps, end

    def step(self, t, rows, records, again):
        done = min(1.0, t / (self.steps - 1))
        return clip(rows, self.clip_norm * self.end ** (round(100 * done) / 100)).sum(0) / self.divisor


class Following:
    """The clip norm follows a quantile: of the norms below `edge` clip norms."""

    def __init__(self, clip_norm, divisor, target=0.5, rate=0.2, edge=1.0):
        self.clip_norm, self.divisor = clip_norm, divisor
        self.target, self.rate, self.edge = target, rate, edge

    def step(self, t, rows, records, again):
        found = clip(rows, self.clip_norm).sum(0) / self.divisor
        below = (rows.norm(dim=1) <= self.edge * self.clip_norm).double()
        # centred at 1/2 where the count is paid for: batch sizes other than the expected one matter less
        fraction = below.sum() / self.divisor if self.edge < 1 else 0.5 + (below - 0.5).sum() / self.divisor
        self.clip_norm *= math.exp(-self.rate * (min(1.0, max(0.0, fraction.item())) - self.target))
        return found


class Momentum:
    """Everything around a centre: m <- m + rate * sum rule(g - m) / B, `rounds` times on each batch."""

    def __init__(self, divisor, rule, rate, rounds=1, tracked=True):
        self.divisor, self.rule, self.rate, self.rounds, self.tracked = divisor, rule, rate, rounds, tracked
        self.centre = 0.0

    def step(self, t, rows, records, again):
        here = self.centre if self.tracked else 0.0
        for _ in range(self.rounds):
            here = here + self.rate * self.rule(rows - here).sum(0) / self.divisor
        self.centre = here
        return here


class Twice:
    def __init__(self, clip_norm, divisor, rest, rate):
        self.clip_norm, self.divisor, self.rest, self.rate, self.average = clip_norm, divisor, rest, rate, 0.0

    def step(self, t, rows, records, again):
        first = clip(rows, self.clip_norm)
        second = clip(rows - first, self.rest).nan_to_num(0).sum(0) / self.divisor
        self.average = self.average + self.rate * (second - self.average)
        return first.sum(0) / self.divisor + self.average


class Remembering:
    def __init__(self, clip_norm, num_records, rate, restart=None):
        self.clip_norm, self.num_records, self.rate, self.restart = clip_norm, num_records, rate, restart
        self.memory, self.gradient = None, 0.0

    def step(self, t, rows, records, again):
        if self.memory is None:
            self.memory, self.gradient = torch.zeros(self.num_records, rows.shape[1]).double(), 0.0
        sent = clip(rows - self.memory[list(records)], self.clip_norm).nan_to_num(0)
        self.memory[list(records)] += self.rate * sent
        found = self.gradient = self.gradient + self.rate / self.num_records * sent.sum(0)
        if self.restart is not None and (t + 1) % self.restart == 0:
            self.memory = None
        return found


class Differences:
    def __init__(self, clip_norm, divisor, smoothness, restart):
        self.clip_norm, self.divisor = clip_norm, divisor
        self.smoothness, self.restart = smoothness, restart
        self.last = self.gradient = None

    def step(self, t, rows, records, again, here=None):
        bound = self.clip_norm
        if t % self.restart:
            bound = self.smoothness * max(1e-4, (here - self.last).norm().item())
        if bound >= self.clip_norm:
            found = clip(rows, self.clip_norm).sum(0) / self.divisor
        else:
            found = self.gradient + clip(rows - again(self.last), bound).nan_to_num(0).sum(0) / self.divisor
        self.gradient, self.last = found, here.clone()
        return found


class Fed:
    def __init__(self, clip_norm, divisor, feedback, bound=None):
        self.clip_norm, self.divisor, self.feedback, self.bound = clip_norm, divisor, feedback, bound
        self.error = None

    def step(self, t, rows, records, again):
        error = torch.zeros(rows.shape[1]).double() if self.error is None else self.error
        first = clip(rows, self.clip_norm)
        entering = (rows if self.bound is None else clip(rows, self.bound)) - first
        given = clip(error.unsqueeze(0), self.feedback).nan_to_num(0)[0]
        self.error = error + entering.sum(0) - given
        return (first.sum(0) + given) / self.divisor


def huber(clip_norm, mu):
    limit = clip_norm / (clip_norm + mu)
    return lambda rows: rows * (clip_norm / rows.norm(dim=1, keepdim=True)).clamp_max(limit)


def normalised(clip_norm, nu):
    return lambda rows: rows * clip_norm / rows.norm(dim=1, keepdim=True).clamp_min(nu)


def coordinates(clip_norm, size):
    bound = clip_norm / math.sqrt(size)
    return lambda rows: rows.clamp(-bound, bound)


def layers(model):
    """The places of each layer's numbers in a flat gradient."""
    groups, start = {}, 0
    for name, p in model.named_parameters():
        groups.setdefault(name.rpartition(".")[0], []).extend(range(start, start + p.numel()))
        start += p.numel()
    return list(groups.values())


def references(model, clip_norm, num, rate):
    """By the text that names an estimator: a reference of it, and the tolerance that it is entitled to."""
    divisor, size = rate * num, sum(p.numel() for p in model.parameters())
    c = clip_norm
    return {
        "flat": (Weighted(c, divisor, by_clipping), 1e-9),
        "automatic": (Weighted(c, divisor, automatic), 1e-9),
        "psac": (Weighted(c, divisor, psac), 1e-9),
        "per_layer": (Weighted(c, divisor, by_clipping, layers(model)), 1e-9),
        "per_layer:automatic": (Weighted(c, divisor, automatic, layers(model)), 1e-9),
        "schedule:steps=4,clip_end=0.25": (Schedule(c, divisor, 4, 0.25), 1e-9),
        "quantile:rate=0.9": (Following(c, divisor, rate=0.9), 1e-9),
        "slack:rate=0.9": (Following(c, divisor, rate=0.9, edge=0.7), 1e-5),
        "median:rate=0.5": (Momentum(divisor, lambda rows: clip(rows, c), 0.5), 1e-9),
        "huber:rate=1,mu=2": (Momentum(divisor, huber(c, 2 * c), 1.0), 1e-9),
        "coordinate_median:rate=0.5": (Momentum(divisor, coordinates(c, size), 0.5), 1e-9),
        "geometric_median:rate=0.5,rounds=3": (Momentum(divisor, normalised(c, 0.5 * c), 0.5, 3), 1e-9),
        "two_threshold:rest=1.5,rate=0.1": (Twice(c, divisor, 1.5 * c, 0.1), 1e-9),
        # the memory is kept in float32, and what is clipped to shrinks by 1e-5 in hidden feedback
        "clip21:rate=0.7,restart=3": (Remembering(c, num, 0.7, 3), 1e-6),
        "diff2:smoothness=0.3,restart=3": (Differences(c, divisor, 0.3, 3), 1e-9),
        # some steps are so long that a whole gradient is shorter than the difference may be
        "diff2:smoothness=4,restart=9": (Differences(c, divisor, 4.0, 9), 1e-9),
        "dice:feedback=1": (Fed(c, divisor, c), 3e-5),
        "dice:feedback=1,bound=1.5": (Fed(c, divisor, c, 1.5 * c), 3e-5),
    }
