# SPDX-License-Identifier: Apache-2.0
"""`explain()` tells the path of every parameter, of the step that ran, and nothing about the examples."""

import pytest
import torch
from torch import nn

from clipping import Costs
from tests.support.dpopt.private_runs import explicit

T = 24


def layered():
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 64))


def paths(private):
    rows = [line.split("  ") for line in private.explain().splitlines()[1:-1]]
    return {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()][1] for row in rows}


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        (Costs(traffic=1e-3, keep_memory=1e9), {"0.weight": "form and keep", "4.weight": "form and keep"}),
        (Costs(keep_memory=0), {"0.weight": "form and drop", "4.weight": "gram"}),
    ],
)
def test_each_parameter_is_listed_with_the_path_it_took(costs, expected):
    model = layered()
    with explicit(model, costs=costs) as private:
        assert set(paths(private).values()) == {"-"}
        for batch in private.batches(list(torch.randn(8, T, 6)), steps=1):
            private.accumulate(model(torch.stack(batch.examples)).square().sum((1, 2)))
            text = private.explain()
            private.release()
    found = paths(private)
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert {name: found[name] for name in expected} == expected
    assert found["1.weight"] == "dense"
    assert "multiply-adds" in text and text == private.explain()


def test_two_backwards_say_so():
    model = layered()
    with explicit(model, two_pass=True) as private:
        for batch in private.batches(list(torch.randn(8, T, 6)), steps=1):
            private.accumulate(model(torch.stack(batch.examples)).square().sum((1, 2)))
            private.release()
        assert set(paths(private).values()) == {"two backwards"}
