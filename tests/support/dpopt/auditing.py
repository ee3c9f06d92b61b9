# SPDX-License-Identifier: Apache-2.0
"""Small audited runs: records with a few features, and features that none of them has, where the canaries lie."""

import torch
from torch import nn

from dpopt import GaussianMechanism, PoissonSampling, PrivateTraining
from dpopt.audit import Canaries
from dpopt.estimators import Run, named_estimator

FEATURES, NUM = 3, 12


def model_for(num, dtype=torch.float64, features=FEATURES):
    torch.manual_seed(0)
    return nn.Linear(features + num, 1).to(dtype)


def records(num_canaries, num=NUM, dtype=torch.float64, features=FEATURES):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(num, features, generator=generator, dtype=dtype)
    return list(torch.cat((rows, torch.zeros(num, num_canaries, dtype=dtype)), 1))


def canaries(num, *, untouched=True, features=FEATURES, **options):
    return Canaries(num, where={"weight": range(features, features + num)}, untouched=untouched, **options)


def losses(model, batch):
    return (model(torch.stack(list(batch))).squeeze(1) - 1).square()


def losses_of_users(model, batch):
    return (model(torch.stack([torch.stack(list(user)) for user in batch])).squeeze(2) - 1).square().sum(1)


def audited(
    num=40,
    *,
    noise=1.0,
    rate=0.5,
    estimator="flat",
    sampling=None,
    clip=0.5,
    audit="canaries",
    model=None,
    **options,
):
    """(run, model, records); `audit` None: the same run without."""
    model = model_for(num) if model is None else model
    sampling = PoissonSampling(rate, rate * NUM) if sampling is None else sampling
    made = (
        named_estimator(estimator, Run(model, clip, NUM, sampling))
        if isinstance(estimator, str)
        else estimator
    )
    run = PrivateTraining(
        model,
        estimator=made,
        mechanism=options.pop("mechanism", GaussianMechanism(noise)),
        sampling=sampling,
        accountant_name=options.pop("accountant_name", "rdp"),
        audit=canaries(num) if audit == "canaries" else audit,
        **{"insecure_seed": 1, **options},
    )
    return run, model, records(num)


def train(run, model, dataset, steps, lr=0.05):
    """The released gradients of each step, flattened."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    found = []
    with run:
        for batch in run.batches(dataset, steps=steps):
            for part in batch.parts(100):
                run.evaluate(lambda p=part: losses(model, p.examples), records=part.indices)
            run.release()
            found.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
            optimizer.step()
    return torch.stack(found)
