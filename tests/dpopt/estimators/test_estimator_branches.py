# SPDX-License-Identifier: Apache-2.0
"""Parameters that some examples reach and others do not: a gradient of 0 is a gradient, also where nothing says so.

Around a centre m, an example that does not reach a parameter has the difference 0 - m. If that were added only where
some other example of the same backward reaches the parameter, one example would switch on the terms of all others.
"""

import pytest
import torch
from torch import nn

from dpopt.estimators import Centred
from tests.support.dpopt.estimator_runs import (
    Momentum,
    Remembering,
    clip,
    collect,
    coordinates,
    gradient_of,
    normalised,
    opened,
    rows_of,
)

C, N = 0.5, 8


class Branch(nn.Module):
    """A second layer for examples whose first number is large; nothing runs where there are none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.main, self.extra = nn.Linear(2, 1).double(), nn.Linear(2, 1).double()

    def forward(self, inputs):
        out = self.main(inputs)
        mine = inputs[:, :1] > 5
        return out + torch.where(mine, self.extra(inputs), torch.zeros_like(out)) if mine.any() else out


def losses_of(model, batch):
    return model(torch.stack(list(batch))).squeeze(1).square()


ORDINARY = list(torch.randn(N - 1, 2, generator=torch.Generator().manual_seed(1)).double())
ODD = torch.tensor([6.0, 0.3], dtype=torch.float64)


def gradient(estimator, data, *, centre=None, size=100, two_pass=False, steps=1):
    model = Branch()
    with opened(model, estimator, clip=C, num=N, two_pass=two_pass) as private:
        if centre is not None:
            private.estimator.centre.update(
                {n: torch.full_like(p, centre) for n, p in model.named_parameters()}
            )
        for batch in private.batches(data, steps=steps):
            collect(private, model, losses_of, batch, size)
            private.release()
    return gradient_of(model)


@pytest.mark.parametrize("size", [100, 3], ids=["whole", "in parts"])
@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("options", [{}, {"coordinates": 6}], ids=["median", "coordinates"])
def test_guarantee_an_example_that_reaches_a_layer_alone_moves_the_sum_by_its_sensitivity(
    options, two_pass, size
):
    made = Centred(C, **options)
    one, other = (
        gradient(made, data, centre=10.0, size=size, two_pass=two_pass) * N
        for data in (ORDINARY, [*ORDINARY, ODD])
    )
    assert (one - other).norm() <= C * (1 + 1e-6)


def run_both(name, reference, *, size, two_pass, data, tolerance):
    model = Branch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with opened(model, name, clip=C, num=len(data), rate=0.5, two_pass=two_pass) as private:
        for t, batch in enumerate(private.batches(data, steps=8)):
            rows = rows_of(model, batch.examples, losses_of)
            expected = reference.step(t, rows, batch.indices, None)
            collect(private, model, losses_of, batch, size)
            private.release()
            torch.testing.assert_close(gradient_of(model), expected, rtol=tolerance, atol=tolerance)
            optimizer.step()


@pytest.mark.parametrize("size", [100, 1, 3])
@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("name", ["median", "coordinate_median", "geometric_median", "clip21"])
def test_what_is_not_reached_has_the_gradient_zero(name, odd, size, two_pass):
    """Also of a layer that nobody ever reaches: its centre would gather noise for good."""
    data = [*ORDINARY, ODD] if odd else ORDINARY
    divisor = 0.5 * len(data)
    reference = {
        "median": Momentum(divisor, lambda rows: clip(rows, C), 0.5),
        "coordinate_median": Momentum(divisor, coordinates(C, 6), 0.5),
        "geometric_median": Momentum(divisor, normalised(C, 0.5 * C), 0.5, 2),
        "clip21": Remembering(C, len(data), 0.7),
    }[name]
    name += ":rate=0.7" if name == "clip21" else ":rate=0.5"
    run_both(name, reference, size=size, two_pass=two_pass, data=data, tolerance=1e-6)


def test_the_centre_of_a_layer_that_nobody_reaches_is_pulled_back():
    found = gradient(Centred(C), ORDINARY, centre=10.0, steps=30)
    assert found[3:].abs().max() < 10.0 - 1.0  # 3 numbers of the main layer, then 3 of the other


@pytest.mark.parametrize("name", ["flat", "quantile", "two_threshold", "dice", "diff2"])
def test_without_a_centre_nothing_depends_on_it(name):
    one, other = (gradient(name, data) * N for data in (ORDINARY, [*ORDINARY, ODD]))
    assert (one - other).norm() <= 5 * C * (1 + 1e-6)
