# SPDX-License-Identifier: Apache-2.0
"""The tasks by name. To add one: a function from options and a seed to a `Problem`, and one line here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from benchmarks.estimators.problem import Problem


@dataclass(frozen=True)
class Plan:
    """The public numbers of a task, its grid and its scores.

    The grid is every pair of `clip_norms` and `rates`. `relative`: a rate is the learning rate times the clip
    norm, for optimizers that do not adapt to the length of the gradient. `scores` says which score is which, the one
    that is tuned first; `lower` whether less is better.
    """

    title: str
    num_records: int
    batch_size: int
    steps: int
    micro_batch: int
    optimizer: str
    clip_norms: tuple[float, ...]
    rates: tuple[float, ...]
    relative: bool
    scores: tuple[str, ...]
    lower: bool
    about: str
    folder: str = ""
    timing_batch: int | None = None

    @property
    def grid(self) -> tuple[tuple[float, float], ...]:
        """Pairs of clip norm and learning rate."""
        pairs = itertools.product(self.clip_norms, self.rates)
        return tuple((c, r / c if self.relative else r) for c, r in pairs)


@dataclass(frozen=True)
class Places:
    """Where data sets and the language model lie; whoever runs the benchmark says."""

    data: str = ""
    model: str = ""


def heavy_tails(places: Places, plan: Plan, seed: int) -> Problem:
    """Least squares under alpha-stable label noise."""
    from benchmarks.estimators.regression import drawn

    return drawn(plan.num_records, seed)


def label_noise(places: Places, plan: Plan, seed: int) -> Problem:
    """Digits, a fifth of the training labels flipped."""
    from benchmarks.estimators.images import drawn

    return drawn(places.data, plan.folder, plan.num_records, seed)


def e2e(places: Places, plan: Plan, seed: int) -> Problem:
    """Restaurant descriptions from meaning representations."""
    from benchmarks.estimators.language import drawn

    return drawn(places.data, places.model, plan.num_records, seed)


_DIGITS = Plan(
    title="", num_records=0, batch_size=400, steps=200, micro_batch=800, optimizer="sgd",
    clip_norms=(0.1, 1.0, 10.0), rates=(0.3, 1.0, 3.0, 10.0), relative=True, scores=("test accuracy, %",), lower=False,
    about="a fifth of the training labels replaced by another digit, clean test labels, one hidden layer of 64 ReLU; "
    "split, flips, weights and noise by the seed",
)  # fmt: skip


def _digits(title: str, folder: str, num_records: int) -> Plan:
    return replace(_DIGITS, title=title, folder=folder, num_records=num_records)


PLANS: Mapping[str, Plan] = {
    "heavy_tails": Plan(
        title="Heavy-tailed regression", num_records=2_500, batch_size=400, steps=150, micro_batch=800,
    optimizer="sgd", clip_norms=(1.0, 10.0, 100.0), rates=(0.3, 1.0, 3.0, 10.0), relative=True,
        scores=("distance to the truth", "excess test Huber loss"), lower=True,
        about="50 Gaussian features, truth of length 3, alpha-stable label noise (alpha 1.5, scale 1), squared loss; "
        "the Huber loss (width 1) is that of fresh noisy labels, above that of the truth; data and noise by the seed",
    ),
    "label_noise_mnist": _digits("MNIST, 20 % of labels flipped", "mnist_t10k", 8_000),
    "label_noise_usps": _digits("USPS, 20 % of labels flipped", "usps", 7_291),
    "e2e": Plan(
        title="E2E descriptions, small language model", num_records=5_000, batch_size=128, steps=24, micro_batch=32,
        optimizer="adamw", clip_norms=(1.0,), rates=(2e-3, 6e-3), relative=False,
        scores=("validation nats per token",), lower=True,
        about="prompt `{mr} |`, loss on the reference alone; the shorter rows; records and noise by the seed, the "
        "validation rows the same for all",
        folder="e2e_nlg", timing_batch=32,
    ),
}  # fmt: skip
TASKS: Mapping[str, Callable[[Places, Plan, int], Problem]] = {
    "heavy_tails": heavy_tails,
    "label_noise_mnist": label_noise,
    "label_noise_usps": label_noise,
    "e2e": e2e,
}
