# SPDX-License-Identifier: Apache-2.0
"""Norms and sums are computed in full float32, whatever precision the user allows in the model."""

import pytest
import torch

from clipping import Outer
from clipping.rounding.exact_products import EXACT, _places, exact_products
from tests.support.clipping.subjects import SUBJECTS, Recorder, clippers


def precisions():
    return [place.fp32_precision for place in _places()]


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_inside_products_are_exact_and_afterwards_as_before(allowed):
    torch.set_float32_matmul_precision(allowed)
    before = precisions()
    with exact_products():
        assert set(precisions()) <= {EXACT, "none"}
    assert precisions() == before and torch.get_float32_matmul_precision() == allowed
    with pytest.raises(KeyError), exact_products():
        raise KeyError
    assert precisions() == before


@pytest.mark.parametrize("kind", ["flat", "per_layer"])
@pytest.mark.parametrize("two_pass", [False, True])
def test_guarantee_norms_and_sums_never_use_tf32(kind, two_pass, monkeypatch):
    seen = []
    for method in ("norms", "weighted_sum"):
        original = getattr(Outer, method)

        def watched(self, *args, original=original, method=method):
            seen.append((method, set(precisions()) <= {EXACT, "none"}))
            return original(self, *args)

        monkeypatch.setattr(Outer, method, watched)
    torch.set_float32_matmul_precision("medium")
    subject = SUBJECTS["mlp on sequences"]
    model = subject.build().double()
    with Recorder(model, clippers(model, 1.0)[kind], two_pass=two_pass) as recorder:
        recorder.backward(subject.run(model, subject.inputs(3)).sum())
    assert {method for method, _ in seen} == {"norms", "weighted_sum"}
    assert all(exact for _, exact in seen)
