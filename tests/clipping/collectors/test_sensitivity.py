# SPDX-License-Identifier: Apache-2.0
"""Law 1: adding or removing one example, whatever it holds, moves the clipped sum by at most its sensitivity."""

import math
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.clipping.subjects import SUBJECTS, Recorder, cast, clippers, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

FACTORS = {
    "ordinary": 1.0,
    "nothing": 0.0,
    "large": 1e4,
    "huge": 1e15,
    "1e38": 1e38,
    "negative": -1e30,
    "tiny": 1e-30,
    "nan": math.nan,
    "inf": math.inf,
}


@cache
def built(name, dtype):
    torch.manual_seed(1)
    return SUBJECTS[name].build().to(dtype).train()


def with_bad_row(subject, inputs, row, value):
    """`inputs` with every floating-point tensor of example `row` filled with `value`, or scaled by it."""
    for x in tensors(inputs):
        if x.is_floating_point():
            one = x.select(subject.batch_dim if x.dim() > 1 else 0, row)
            one.copy_(one * value)
    return inputs


def clipped_sum(name, model, inputs, factors, clipper, *, mean, autocast, two_pass):
    subject = SUBJECTS[name]
    options = {"batch_dim": subject.batch_dim, "mean": mean, "two_pass": two_pass}
    with Recorder(model, clipper, **options) as recorder:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            losses = subject.run(model, inputs).float() * factors
        recorder.backward(losses.mean() if mean else losses.sum())
    total = recorder.total()
    assert all(torch.isfinite(value).all() for value in total.values())
    assert all(p.grad is None for p in model.parameters())
    return torch.cat([value.double().flatten() for value in total.values()])


@pytest.mark.parametrize("name", SUBJECTS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["flat", "per_layer", "per_parameter"]),
    precision=st.sampled_from(["float32", "bfloat16", "autocast"]),
    factor=st.sampled_from(sorted(FACTORS)),
    through_inputs=st.booleans(),
    clip_norm=st.sampled_from([1e-3, 1.0, 1e3]),
    row=st.integers(0, 2),
    mean=st.booleans(),
    two_pass=st.booleans(),
    seed=st.integers(0, 5),
)
@example("flat", "float32", "nan", True, 1.0, 0, False, False, 0)
@example("per_layer", "float32", "inf", False, 1.0, 1, True, False, 1)
@example("per_parameter", "bfloat16", "1e38", True, 1.0, 2, False, True, 2)
@example("per_parameter", "float32", "huge", False, 1.0, 0, False, False, 3)
@example("flat", "float32", "large", True, 1.0, 1, False, True, 4)
def test_guarantee_one_example_moves_the_sum_by_at_most_the_sensitivity(
    name, kind, precision, factor, through_inputs, clip_norm, row, mean, two_pass, seed
):
    subject = SUBJECTS[name]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = built(name, dtype)
    clipper = clippers(model, clip_norm)[kind]
    torch.manual_seed(seed)
    clean = cast(subject.inputs(3), dtype)
    bad = subject.take(clean, torch.arange(3))
    factors, absent = torch.ones(3), torch.ones(3)
    absent[row] = 0
    if through_inputs and not subject.integer:
        bad = with_bad_row(subject, bad, row, FACTORS[factor])
    else:
        factors[row] = FACTORS[factor]
    arguments = {"mean": mean, "autocast": precision == "autocast", "two_pass": two_pass}

    present = clipped_sum(name, model, bad, factors, clipper, **arguments)
    # The neighbour without the example, in a batch of the same shape: kernels round by the shape.
    without = clipped_sum(name, model, clean, absent, clipper, **arguments)
    moved = float((present - without).norm())
    assert moved <= clipper.sensitivity * (1 + 1e-5)

    if precision == "float32":
        others = torch.tensor([i for i in range(3) if i != row])
        removed = clipped_sum(name, model, subject.take(clean, others), torch.ones(2), clipper, **arguments)
        assert float((present - removed).norm()) <= clipper.sensitivity * (1 + 1e-5)
        assert float((without - removed).norm()) <= clipper.sensitivity * 1e-4
