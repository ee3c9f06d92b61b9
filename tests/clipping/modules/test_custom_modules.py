# SPDX-License-Identifier: Apache-2.0
"""Modules without a rule: their per-example gradients are those of the forward that ran, whatever it drew."""

import random

import numpy as np
import pytest
import torch

from clipping import Gathering, Tape
from tests.support.clipping.custom import CUSTOM, DRAWING, D

B = 5


def seeded(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def losses_of(outputs):
    target = torch.linspace(-1, 1, outputs.shape[1], dtype=outputs.dtype)
    return ((outputs - target) ** 2).sum(1)


def truth(model, x, seed):
    """The gradient of each example's loss in one forward of the batch."""
    seeded(seed)
    losses = losses_of(model(x))
    named = dict(model.named_parameters())
    trained = [p for p in named.values() if p.requires_grad]
    rows = [
        torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True, allow_unused=True)
        for loss in losses
    ]
    names = [name for name, p in named.items() if p.requires_grad]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}


def recorded(model, found, x, seed):
    """The same from the tape."""
    seeded(seed)
    found.clear()
    losses_of(model(x)).sum().backward()
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    zeros = {name: torch.zeros(len(x), *shape, dtype=x.dtype) for name, shape in shapes.items()}
    return {name: found[name].dense() if name in found else zeros[name] for name in shapes}


def built(build):
    seeded(0)
    return build().double()


def compare(build, seeds, sizes=(B,)):
    model, plain = built(build), built(build)
    found = {}
    with Tape(model, lambda _: Gathering(lambda grads, n: found.update(grads))):
        for seed in seeds:
            for size in sizes:
                x = torch.randn(size, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                expected = truth(plain, x.clone(), seed)
                left = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
                got = recorded(model, found, x.clone(), seed)
                for name, value in expected.items():
                    close = {"rtol": 1e-9, "atol": 1e-12 + 1e-9 * float(value.abs().max())}
                    torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}", **close)
                assert torch.equal(left[0], torch.get_rng_state())
                assert left[1:] == (random.getstate(), np.random.get_state()[2])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_modules_agree_with_autograd(name):
    compare(CUSTOM[name], seeds=(0, 1), sizes=(B, 1, D))


@pytest.mark.parametrize("name", DRAWING)
def test_custom_modules_that_draw_agree_with_the_forward_that_ran(name):
    compare(DRAWING[name], seeds=range(4), sizes=(B, 1))
