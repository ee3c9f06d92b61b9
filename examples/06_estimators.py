# SPDX-License-Identifier: Apache-2.0
"""Clipping is biased: where it stops on skewed data, and which estimators of the gradient do better.

    python examples/06_estimators.py --epsilon 2 --steps 600

A point x is fitted to records a by (x - a)^2 / 2, so it should end at their mean. Two records of three lie on one side,
one far on the other: clipped, the far ones pull no harder than the near ones, and x stops short of the mean. All
estimators get the same budget, clip norm and batches; their names go to `make_private(clipping=...)` and
`dpopt finetune --estimator` too.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from accountants import accountant
from dpopt import Budget, GaussianMechanism, PrivateTraining, poisson
from dpopt.budget.budget import noise_within
from dpopt.budget.prices import priced
from dpopt.estimators import Run, named_estimator

DELTA, CLIP_NORM, WIDTH = 1e-5, 0.5, 20
NAMES = ("flat", "automatic", "quantile", "median", "two_threshold:rest=4,rate=0.05", "dice")


def skewed(num_records: int) -> Tensor:
    """(N, D) records: two at -1 and one at 2 along the first axis, and a little spread; their mean is near 0."""
    records = 0.1 * torch.randn(num_records, WIDTH)
    records[:, 0] += torch.tensor([-1.0, -1.0, 2.0]).repeat(num_records // 3 + 1)[:num_records]
    return records


def fit(name: str, records: Tensor, settings: argparse.Namespace) -> tuple[float, float, str]:
    """Distance of the fitted point from the mean, the noise multiplier, and what was promised."""
    model = nn.Linear(1, WIDTH, bias=False)
    nn.init.zeros_(model.weight)
    sampling = poisson(num_records=len(records), batch_size=len(records) / 10)
    estimator = named_estimator(name, Run(model, CLIP_NORM, len(records), sampling))
    budget = Budget(settings.epsilon, DELTA)
    run = priced(estimator, sampling, settings.steps)
    noise = noise_within(budget, accountant("pld"), run)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with PrivateTraining(
        model,
        estimator=estimator,
        mechanism=GaussianMechanism(noise),
        sampling=sampling,
        budget=budget,
        accountant_name="pld",
    ) as private:
        for batch in private.batches(list(records), steps=settings.steps):
            for part in batch.parts(512):
                rows = torch.stack(part.examples)  # pyright: ignore[reportArgumentType]
                private.evaluate(
                    lambda rows=rows: (model(torch.ones(len(rows), 1)) - rows).square().sum(1) / 2,
                    records=part.indices,
                )
            private.release()
            optimizer.step()
        promised = f"epsilon {private.epsilon(DELTA):.2f}; {estimator.guarantee}"
    found = model.weight.detach().squeeze(1)
    return (found - records.mean(0)).norm().item(), noise, promised


def main() -> None:
    """Read the command line, fit with each estimator, and show where they stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=3000, help="how many there are")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--epsilon", type=float, default=2.0, help="budget at delta 1e-5, for each estimator")
    settings = parser.parse_args()
    torch.manual_seed(0)
    records = skewed(settings.records)
    table = Table(title=f"epsilon {settings.epsilon:g} at delta {DELTA:g}, clip norm {CLIP_NORM:g}")
    for column in ("estimator", "distance from the mean", "noise multiplier"):
        table.add_column(column)
    for name in track(NAMES, description="fitting"):
        distance, noise, promised = fit(name, records, settings)
        table.add_row(name, f"{distance:.3f}", f"{noise:.2f}")
        print(f"{name}: loss {distance:.3f}, {promised}")
    Console().print(table)


if __name__ == "__main__":
    main()
