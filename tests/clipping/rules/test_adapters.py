# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT: exact against a loop of autograd."""

import pytest
import torch

from clipping import FlatClipper, Inputs, examine
from tests.support.clipping.adapted import ADAPTED
from tests.support.clipping.subjects import Recorder, clipped_by_hand, clippers, example_gradients, input_ids

B = 4

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_is_clipped_as_by_a_loop_of_autograd(name):
    subject = ADAPTED[name]
    model = subject.build().double().train()
    inputs = subject.inputs(B)
    gradients = example_gradients(subject, model, inputs, B)
    norms = sorted(sum(float(v.square().sum()) for v in g.values()) ** 0.5 for g in gradients)
    assert norms[0] > 0
    for kind, clipper in clippers(model, norms[B // 2]).items():
        with Recorder(model, clipper) as recorder:
            subject.run(model, inputs).sum().backward()
        assert recorder.sizes == [B], kind
        for key, value in clipped_by_hand(gradients, clipper).items():
            size = max(float(value.abs().max()), 1e-3)
            torch.testing.assert_close(
                recorder.total()[key], value, rtol=subject.rtol, atol=subject.rtol * size, msg=f"{kind} {key}"
            )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["prompt tuning", "p-tuning", "LoHa", "LoKr"])
def test_a_model_with_such_an_adapter_is_examined(name):
    model = ADAPTED[name].build()
    examine(model, Inputs((), input_ids(2)))
    assert all(p.grad is None for p in model.parameters())


def test_a_module_handed_to_another_one_is_recorded_by_itself():
    # DoRA's magnitude calls the factors of LoRA, which are not below it.
    model = ADAPTED["DoRA"].build()
    with Recorder(model, FlatClipper(1.0)) as recorder:
        kinds = {type(layer.module).__name__ for layer in recorder.tape.layers}
    assert kinds == {"Linear", "DoraLinearLayer"}
