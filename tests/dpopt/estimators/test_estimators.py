# SPDX-License-Identifier: Apache-2.0
"""What every named estimator makes of the instance on which clipping is biased, and how much it costs in noise.

f(x) = E (x - a)^2 / 2 with a in {-1, -1, 2} equally likely: the minimum is at 0, and clipped at 1/2 the gradients
x - a balance at x = -3/4. Each limit below is derived: where gradients are only weighted, it is the root of the
weighted mean; what remembers what clipping cut off ends at 0.

References: Koloskova, Hendrikx, Stich (2023), arXiv:2305.01588 (clipping has a bias that no step size removes).
"""

import statistics
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from accountants import accountant
from dpopt import Budget, GaussianMechanism, PoissonSampling, PrivateTraining
from dpopt.budget.budget import noise_within
from dpopt.budget.prices import priced
from dpopt.estimators import ESTIMATORS, Run, named_estimator

C = 0.5
POINTS = np.array([-1.0, -1.0, 2.0])


def flat(norms, bound):
    return np.minimum(1, bound / norms)


def automatic(norms, bound):
    return bound / (norms + 0.01)


def psac(norms, bound):
    return bound / (norms + 0.1 / (norms + 0.1))


def huber(norms, bound):  # a width of one clip norm
    return np.minimum(0.5, bound / norms)


def normalised(norms, bound):  # within half a clip norm, not
    return bound / np.maximum(0.5 * bound, norms)


def root(weight, bound=C):
    """Where the weighted mean of the gradients vanishes."""

    def mean(x):
        gradients = x - POINTS
        return float(np.sum(weight(np.abs(gradients), bound) * gradients))

    return brentq(mean, -1 + 1e-12, 1.9, xtol=1e-10)


BIASED = root(flat)
# name -> (learning rate, steps, limit), with the numbers that the name has by default
LIMITS = {
    "flat": (1.0, 50, BIASED),
    "automatic": (0.1, 90, root(automatic)),
    "psac": (0.5, 60, root(psac)),
    **{f"per_{part}": (1.0, 50, BIASED) for part in ("layer", "block", "adapter")},
    **{f"per_{part}:flat": (1.0, 50, BIASED) for part in ("layer", "block", "adapter")},
    **{f"per_{part}:automatic": (0.1, 90, root(automatic)) for part in ("layer", "block", "adapter")},
    **{f"per_{part}:psac": (0.5, 60, root(psac)) for part in ("layer", "block", "adapter")},
    "schedule:steps=20,clip_end=0.5": (1.0, 70, root(flat, C / 2)),
    # Two of three norms are |x + 1|, so that clip norm and |x + 1| follow each other down to 0: by e^(-rate / 6) a step.
    "quantile": (0.5, 720, -1.0),
    "slack": (0.5, 720, -1.0),
    # A centre is made of the releases: where they vanish, it does, and what is left is the rule by itself.
    "median": (0.3, 100, BIASED),
    "huber": (0.5, 90, root(huber)),
    "coordinate_median": (0.3, 100, BIASED),
    "geometric_median": (0.3, 60, root(normalised)),
    "two_threshold": (0.3, 120, root(flat, 3 * C)),  # as clipping at the sum of both thresholds
    "clip21": (0.3, 200, 0.0),
    "diff2": (0.5, 121, BIASED),  # differences are whole, and whole gradients clipped
    # Feedback of 1/50 stays saturated: 2 u - C - C / 50 = 0 for u = x + 1.
    "dice": (1.0, 50, -1 + 0.51 * C),
}
CASES = LIMITS | {
    # At 0 the clipped sum is 1 clip norm, which is what feedback can make up for.
    "dice:feedback=1": (0.2, 300, 0.0),
    "dice:feedback=1,bound=100": (0.2, 300, 0.0),
    "dice:feedback=0.1": (1.0, 50, -1 + 0.55 * C),
    "two_threshold:rest=1,rate=0.3": (0.3, 120, root(flat, 2 * C)),
    "two_threshold:rest=4,rate=0.3": (0.3, 120, 0.0),  # all gradients at 0 are below 5 clip norms
    "quantile:rate=0.5": (0.5, 120, -1.0),
    "slack:rate=0.5": (0.5, 120, -1.0),
    "median:rate=0.5": (0.3, 100, BIASED),
    "clip21:rate=0.5": (0.3, 100, 0.0),
    "diff2:smoothness=1,restart=3": (0.6, 60, BIASED),
}


class Place(nn.Module):
    """One number, in a layer of an adapter of a block: every way to group parameters knows what to do."""

    def __init__(self, size, start):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module(), nn.Module()])  # one by itself would be no list of blocks
        self.blocks[0].lora_A = nn.Linear(1, size, bias=False)
        nn.init.constant_(self.blocks[0].lora_A.weight, start)
        self.double()

    @property
    def weight(self):
        return self.blocks[0].lora_A.weight

    def forward(self, ones):
        return self.blocks[0].lora_A(ones)


def descend(text, data, folder, *, lr, steps, rate=1.0, noise=0.0, clip_norm=C, start=0.3, seed=1):
    """The place to which an estimator leads, and the estimator."""
    torch.manual_seed(seed)
    model = Place(data.shape[1], start)
    sampling = PoissonSampling(rate, rate * len(data))
    estimator = named_estimator(text, Run(model, clip_norm, len(data), sampling))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with PrivateTraining(
        model,
        estimator=estimator,
        mechanism=GaussianMechanism(noise),
        sampling=sampling,
        ledger=folder / f"{text.partition(':')[0]}-{seed}.jsonl",
        accountant_name="rdp",
        insecure_seed=seed,
    ) as private:
        for batch in private.batches(data, steps=steps):
            at = torch.tensor(batch.indices)

            def losses(targets):
                outputs = model(torch.ones(len(targets), 1, dtype=torch.float64))
                return (outputs - targets).square().sum(1) / 2

            private.evaluate(partial(losses, data[at]), records=batch.indices)
            private.release()
            optimizer.step()
    return model.weight.detach().squeeze(1)


def test_every_name_has_an_expected_limit():
    # a schedule has no length by default, and "per_layer:flat" is a name by itself
    assert {name.partition(":steps")[0] for name in LIMITS} == set(ESTIMATORS)


def test_the_limits_of_the_instance():
    assert pytest.approx(-0.75) == BIASED
    assert root(huber) == pytest.approx(-0.5) and root(normalised) == pytest.approx(-0.875)
    assert root(flat, 3 * C) == pytest.approx(-0.25)


@pytest.mark.parametrize("text", CASES)
def test_every_estimator_ends_where_theory_says(text, tmp_path):
    lr, steps, limit = CASES[text]
    data = torch.tensor(POINTS).unsqueeze(1)
    found = descend(text, data, tmp_path, lr=lr, steps=steps)
    assert abs(found.item() - limit) < 1e-3


N, SIZE, RATE = 3000, 20, 0.1


def skewed(seed):
    """N points in SIZE dimensions, the instance along one direction and a little noise in all; their mean is 0."""
    generator = torch.Generator().manual_seed(100 + seed)
    direction = nn.functional.normalize(torch.ones(SIZE, dtype=torch.float64), dim=0)
    points = torch.tensor(POINTS).repeat(N // 3).unsqueeze(1) * direction
    points = points + 0.05 * torch.randn(N, SIZE, generator=generator, dtype=torch.float64)
    return points - points.mean(0)


def error(text, folder, steps, seed):
    """|x - x*| after a run within epsilon 2."""
    sampling = PoissonSampling(RATE, RATE * N)
    budget, rule = Budget(2.0, 1e-5), accountant("rdp")
    model = Place(SIZE, 0.0)
    price = priced(named_estimator(text, Run(model, C, N, sampling)), sampling, steps)
    noise = noise_within(budget, rule, price)
    assert rule.curve(price(noise)).epsilon(1e-5) <= 2.0
    place = descend(
        text, skewed(seed), folder, lr=0.05, steps=steps, rate=RATE, noise=noise, start=0.0, seed=seed
    )
    return place.norm().item()


def test_two_thresholds_are_ten_times_closer_at_the_same_price(tmp_path):
    steps = 400
    plain = error("flat", tmp_path, steps, 1)
    assert 0.5 < plain < 1.0
    assert error("two_threshold:rest=4,rate=0.05", tmp_path, steps, 2) < plain / 10


@pytest.mark.slow
def test_two_thresholds_are_ten_times_closer_over_a_thousand_steps(tmp_path):
    found = {
        text: statistics.median(error(text, tmp_path, 1000, seed) for seed in range(5))
        for text in ("flat", "two_threshold:rest=4,rate=0.05")
    }
    plain, both = found.values()
    assert 0.7 < plain < 0.85 and both < plain / 10
