# SPDX-License-Identifier: Apache-2.0
"""The clipped sum equals a loop of plain autograd over single examples, in float64, for every kind of model."""

import pytest
import torch
from torch import nn

from clipping import Costs
from tests.support.clipping.subjects import SUBJECTS, Recorder, clipped_by_hand, clippers, example_gradients

B = 4

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def prepared(name):
    subject = SUBJECTS[name]
    model = subject.build().double().train()
    return subject, model, subject.inputs(B)


def close(got, expected, rtol):
    for name, value in expected.items():
        size = float(value.abs().max())
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=rtol * max(size, 1e-3), msg=lambda m, n=name: f"{n}: {m}"
        )


def typical_norm(gradients):
    norms = [sum(float(v.square().sum()) for v in g.values()) ** 0.5 for g in gradients]
    return sorted(norms)[len(norms) // 2]


@pytest.mark.parametrize("name", SUBJECTS)
def test_clipped_sum_is_that_of_an_autograd_loop(name):
    subject, model, inputs = prepared(name)
    gradients = example_gradients(subject, model, inputs, B)
    median = typical_norm(gradients)
    for clip_norm in (median, 1e6 * median):
        for kind, clipper in clippers(model, clip_norm).items():
            with Recorder(model, clipper, batch_dim=subject.batch_dim) as recorder:
                subject.run(model, inputs).sum().backward()
            assert recorder.sizes == [B], kind
            close(recorder.total(), clipped_by_hand(gradients, clipper), subject.rtol)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", SUBJECTS)
def test_mean_losses_and_micro_batches_give_the_same_sum(name):
    subject, model, inputs = prepared(name)
    gradients = example_gradients(subject, model, inputs, B)
    clipper = clippers(model, typical_norm(gradients))["flat"]
    expected = clipped_by_hand(gradients, clipper)
    for sizes in ([B], [1, 3], [2, 2], [1] * B):
        with Recorder(model, clipper, batch_dim=subject.batch_dim, mean=True) as recorder:
            for part in torch.arange(B).split(sizes):
                subject.run(model, subject.take(inputs, part)).mean().backward()
        assert recorder.sizes == sizes
        close(recorder.total(), expected, subject.rtol)


PATHS = {
    "two backwards": {"two_pass": True},
    "kept": {"costs": Costs(traffic=1e-3, keep_memory=1e9)},
    "dropped": {"costs": Costs(keep_memory=0)},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_path_gives_the_same_sum(name, path):
    subject, model, inputs = prepared(name)
    gradients = example_gradients(subject, model, inputs, B)
    for clipper in clippers(model, typical_norm(gradients)).values():
        with Recorder(model, clipper, batch_dim=subject.batch_dim, **PATHS[path]) as recorder:
            recorder.backward(subject.run(model, inputs).sum())
        close(recorder.total(), clipped_by_hand(gradients, clipper), subject.rtol)
    assert all(p.grad is None for p in model.parameters())


def state_of(model):
    """Everything a tape could leave behind: attributes, hooks and parameters of every module."""
    counted = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            counted[name, key] = len(value) if "hooks" in key else type(value)
    for name, parameter in model.named_parameters():
        counted[name] = (id(parameter), sorted(vars(parameter)), len(parameter._backward_hooks or ()))
    return counted


@pytest.mark.parametrize("name", SUBJECTS)
def test_detaching_leaves_nothing(name):
    subject, model, inputs = prepared(name)
    before, keys = state_of(model), list(model.state_dict())
    with Recorder(model, clippers(model, 1.0)["flat"], batch_dim=subject.batch_dim) as recorder:
        subject.run(model, inputs).sum().backward()
        assert list(model.state_dict()) == keys
    assert state_of(model) == before
    assert list(model.state_dict()) == keys
    assert all(p.grad is None for p in model.parameters())
    assert not recorder.tape.deliveries._records and len(recorder.tape._frames) == 0
    subject.run(model, inputs).sum().backward()  # an ordinary model again
    used = [p for p in model.parameters() if p.grad is not None]
    assert used and recorder.sizes == [B]


@pytest.mark.parametrize("name", SUBJECTS)
def test_outputs_do_not_change_while_attached(name):
    subject, model, inputs = prepared(name)
    expected = subject.run(model, inputs)
    with Recorder(model, clippers(model, 1.0)["flat"], batch_dim=subject.batch_dim):
        torch.testing.assert_close(subject.run(model, inputs), expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            quiet = subject.run(model, inputs)
        assert not quiet.requires_grad
        torch.testing.assert_close(quiet, expected, rtol=1e-12, atol=1e-12)
        with torch.inference_mode():
            subject.run(model, inputs)
        subject.run(model, inputs).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_generation_works_while_attached():
    model = SUBJECTS["GPT-2"].build().eval()
    prompt = torch.randint(0, 13, (2, 2))
    arguments = {
        "max_new_tokens": 2,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(prompt),
    }
    expected = model.generate(prompt, **arguments)
    with Recorder(model, clippers(model, 1.0)["flat"]) as recorder:
        assert torch.equal(model.generate(prompt, **arguments), expected)
        SUBJECTS["GPT-2"].run(model, {"input_ids": prompt}).sum().backward()
    assert recorder.sizes == [2]


def test_evaluation_between_forward_and_backward_changes_nothing():
    subject, model, inputs = prepared("GPT-2, checkpointed")
    clipper = clippers(model, 1e6)["flat"]
    expected = clipped_by_hand(example_gradients(subject, model, inputs, B), clipper)
    with Recorder(model, clipper) as recorder:
        losses = subject.run(model, inputs)
        with torch.no_grad():
            subject.run(model, subject.inputs(1))  # a batch of another size
        losses.sum().backward()
    close(recorder.total(), expected, subject.rtol)


def test_batch_as_large_as_the_sequence_is_long():
    # With T = B a mask (T, T) looks batched; what the module proved at another batch size holds.
    subject = SUBJECTS["attention with a shared mask"]
    model = subject.build().double()
    clipper = clippers(model, 1e6)["flat"]
    with Recorder(model, clipper) as recorder:
        subject.run(model, subject.inputs(3)).sum().backward()
        recorder.sums.totals.clear()
        inputs = subject.inputs(5)
        assert inputs[0].shape[0] == inputs[0].shape[1]
        subject.run(model, inputs).sum().backward()
    close(recorder.total(), clipped_by_hand(example_gradients(subject, model, inputs, 5), clipper), 1e-9)


def test_scale_turns_a_mean_into_each_examples_own_loss():
    subject, model, inputs = prepared("mlp")
    clipper = clippers(model, 0.5)["flat"]
    with Recorder(model, clipper, mean=True) as recorder:
        subject.run(model, inputs).mean().backward()
    close(recorder.total(), clipped_by_hand(example_gradients(subject, model, inputs, B), clipper), 1e-9)


def test_several_backwards_accumulate():
    subject, model, inputs = prepared("layer used twice")
    clipper = clippers(model, 0.5)["per_layer"]
    expected = clipped_by_hand(example_gradients(subject, model, inputs, B), clipper)
    with Recorder(model, clipper) as recorder:
        first = subject.run(model, subject.take(inputs, torch.tensor([0, 1])))
        second = subject.run(model, subject.take(inputs, torch.tensor([2, 3])))
        second.sum().backward()
        first.sum().backward()
    close(recorder.total(), expected, 1e-9)


def test_one_weight_tied_between_linear_layers_of_other_use():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(6, 6)
            self.up = nn.Linear(6, 6, bias=False)
            self.up.weight = self.down.weight

        def forward(self, x):
            return self.up(torch.relu(self.down(x)))

    model = Transposed().double()
    x = torch.randn(B, 6, dtype=torch.float64)
    from tests.support.clipping.subjects import Subject

    subject = Subject(lambda: model, lambda n: (x,))
    clipper = clippers(model, 0.5)["flat"]
    with Recorder(model, clipper) as recorder:
        subject.run(model, (x,)).sum().backward()
    close(recorder.total(), clipped_by_hand(example_gradients(subject, model, (x,), B), clipper), 1e-9)
