# SPDX-License-Identifier: Apache-2.0
"""What the explicit door refuses, and that a refusal leaves no gradient behind."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpopt import MixesExamples
from tests.support.dpopt.private_runs import (
    D,
    assert_gradients,
    clipped_mean,
    examples,
    explicit,
    losses_of,
    mlp,
)


@pytest.mark.parametrize("shape", [(), (4, 2)])
def test_anything_but_one_loss_for_each_example_is_refused(shape):
    text = re.escape(
        f'losses must be one number per example, shape (B,); got {shape}; pass reduction="none" and average '
    )
    with explicit(mlp()) as private, pytest.raises(ValueError, match=text):
        private.accumulate(torch.zeros(shape))


def test_losses_that_do_not_match_the_rows_are_refused():
    model, data = mlp(), examples(8)
    with explicit(model) as private:
        for batch in private.batches(data, steps=1):
            losses = losses_of(model, batch.examples)
            private.accumulate(
                losses.view(4, 2).sum(1)
            )  # two records in one loss, as two crops of one would be
            with pytest.raises(RuntimeError, match="expected every drawn example in the losses, or none"):
                private.release()
            assert private.ledger.num_charges == 0
            private.discard()
            private.accumulate(losses_of(model, batch.examples))
            private.release()


def test_an_unreleased_batch_is_refused():
    model = mlp()
    with explicit(model) as private:
        batches = private.batches(examples(8), steps=2)
        next(batches)
        with pytest.raises(RuntimeError, match=r"expected release\(\) on every drawn batch"):
            next(batches)
        batch = next(private.batches(examples(8), steps=1))
        private.accumulate(losses_of(model, batch.examples))
        with pytest.raises(RuntimeError, match="got one whose gradients are pending"):
            next(private.batches(examples(8), steps=1))
        private.discard()
        next(private.batches(examples(8), steps=1))


def test_the_same_batch_twice_is_refused():
    model = mlp()
    with explicit(model) as private:
        for batch in private.batches(examples(8), steps=1):
            private.accumulate(losses_of(model, batch.examples))
            with pytest.raises(RuntimeError, match="expected each drawn example once per step") as error:
                private.accumulate(losses_of(model, batch.examples[:1]))
            assert not re.search(r"\d", str(error.value))  # the size of a drawn batch is secret
            private.release()


def token_mean(model, inputs):
    losses = model(inputs).square().sum(1)
    return losses.mean().expand(len(losses))


def contrastive(model, inputs):
    outputs = model(inputs)
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(inputs)), reduction="none")


def later_rows(model, inputs):
    outputs = model(inputs)
    return (outputs + outputs.flip(0).cumsum(0).flip(0)).square().sum(1)


def balanced(model, inputs):
    outputs = model(inputs)
    return outputs.square().sum(1) + outputs.softmax(1).mean(0).square().sum()


def centred_inputs(model, inputs):
    return model(inputs).square().sum(1)


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(D, 2)

    def forward(self, inputs):
        return self.head(inputs - inputs.mean(0))


@pytest.mark.parametrize("losses", [token_mean, contrastive, later_rows, balanced, centred_inputs])
def test_the_probe_refuses_losses_in_which_one_example_reaches_another(losses):
    model = Centred() if losses is centred_inputs else mlp()
    with explicit(model, noise=1.0) as private:
        batch = next(private.batches(examples(8), steps=1))
        inputs = torch.stack([x for x, _ in batch.examples])
        with pytest.raises(MixesExamples, match="of one example to depend on that example alone"):
            private.accumulate(losses(model, inputs))
        assert private.sum.num_added == 0 and all(p.grad is None for p in model.parameters())


def test_the_probe_refuses_the_load_balancing_loss_of_a_mixture_of_experts():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=9, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp.gate" not in name)  # a trainable router refuses the loss by itself
    with explicit(model, noise=1.0) as private:
        batch = next(private.batches([torch.randint(0, 9, (5,)) for _ in range(8)], steps=1))
        outputs = model(input_ids=torch.stack(batch.examples), output_router_logits=True)
        losses = outputs.logits.square().sum((1, 2))
        with pytest.raises(MixesExamples, match="of one example to depend on that example alone"):
            private.accumulate(losses + outputs.aux_loss)
        outputs = model(input_ids=torch.stack(batch.examples))
        private.accumulate(outputs.logits.square().sum((1, 2)))
        private.release()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_the_probe_lets_a_broken_example_pass_and_the_sum_leaves_it_out(value):
    model, data = mlp(torch.float64), list(examples(8, torch.float64))
    expected = clipped_mean(model, data[1:])
    data[0] = (torch.full((D,), value, dtype=torch.float64), data[0][1])
    with explicit(model) as private:
        for batch in private.batches(data, steps=1):
            private.accumulate(losses_of(model, batch.examples))
            private.release()
    if value != 1e38:  # a saturated example has a gradient, in the last bias
        assert_gradients(model, expected, tolerance=1e-9)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


class Statistic(nn.Module):
    def __init__(self, persistent):
        super().__init__()
        self.head = nn.Linear(D, 3)
        self.register_buffer("mean", torch.zeros(D), persistent=persistent)

    def forward(self, inputs):
        if self.training:
            self.mean.data.mul_(0.9).add_(inputs.detach().mean(0))
        return self.head(inputs)


def test_buffers_that_would_be_published_without_noise_are_refused():
    for persistent in (True, False):
        model = Statistic(persistent)
        with explicit(model, noise=1.0) as private:
            batch = next(private.batches(examples(8), steps=1))
            private.accumulate(losses_of(model, batch.examples))
            if persistent:
                with pytest.raises(RuntimeError, match=r"changes in \['mean'\].*without noise"):
                    private.release()
                assert private.ledger.num_charges == 0
            else:
                private.release()


def test_buffers_may_move_or_hold_nan_as_long_as_they_stay_the_same():
    model = Statistic(True).eval()
    model.mean[0] = float("nan")
    with explicit(model, noise=1.0) as private:
        for batch in private.batches(examples(8), steps=1):
            model.mean = model.mean.clone()
            private.accumulate(losses_of(model, batch.examples))
            private.release()


def test_batch_norm_switched_to_training_is_refused_at_the_release():
    model = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, 3))
    with pytest.raises(MixesExamples, match="BatchNorm"):
        explicit(model)
    model[0].eval().requires_grad_(False)
    with explicit(model, noise=1.0) as private:
        batch = next(private.batches(examples(8), steps=1))
        model.train()
        with pytest.raises(MixesExamples):
            private.accumulate(losses_of(model, batch.examples))
        with pytest.raises(RuntimeError, match=r"'0\.running_mean'"):
            private.release()


@pytest.mark.parametrize("change", ["freeze", "add", "replace"])
def test_changed_trainable_parameters_are_refused(change):
    model = mlp()
    with explicit(model, noise=1.0) as private:
        next(private.batches(examples(8), steps=1))
        if change == "freeze":
            model[0].weight.requires_grad_(False)
        elif change == "add":
            model.append(nn.Linear(3, 3))
        else:
            model[0].weight = nn.Parameter(torch.zeros(5, D))
        with pytest.raises(RuntimeError, match="expected the trainable parameters that were made private"):
            private.release()
        assert private.ledger.num_charges == 0


def test_another_model_s_losses_are_refused():
    model = mlp()
    other = copy.deepcopy(model)
    with explicit(model, noise=1.0) as private:
        batch = next(private.batches(examples(8), steps=1))
        with pytest.raises(RuntimeError, match="got a backward that never met its layers"):
            private.accumulate(losses_of(other, batch.examples))


def test_nothing_is_computed_outside_an_open_run():
    model, data = mlp(), examples(8)
    training = explicit(model, noise=1.0)
    for _ in range(2):  # before and after
        with pytest.raises(RuntimeError, match="expected an open run"):
            next(training.batches(data, steps=1))
        with pytest.raises(RuntimeError, match="got one outside a step"):
            training.accumulate(losses_of(model, data))
        with pytest.raises(RuntimeError, match="got none; take one from batches"):
            training.release()
        assert all(p.grad is None for p in model.parameters())
        with training as private:
            with pytest.raises(RuntimeError, match="got one outside a step"):
                private.accumulate(losses_of(model, data))
            with pytest.raises(RuntimeError, match="got one outside a step"):
                losses_of(model, data).sum().backward()


def test_a_graph_made_before_or_used_after_the_run_gives_no_gradient():
    model, data = mlp(), examples(8)
    early = losses_of(model, data)
    with explicit(model, noise=1.0) as private:
        for _ in private.batches(data, steps=1):
            with pytest.raises(RuntimeError, match="used only inside the forward"):
                private.accumulate(early)
            late = losses_of(model, data).sum()
            break
    with pytest.raises(RuntimeError, match="got one outside a step"):
        late.backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_huge_example_is_not_taken_for_one_that_mixes():
    # The square of its input overflows; times a gradient of zero that says nothing.
    data = [
        (x.index_fill(0, torch.tensor([0]), 3e38) if i == 2 else x, y) for i, (x, y) in enumerate(examples(8))
    ]
    model = mlp()
    with explicit(model, noise=1.0) as private:
        for batch in private.batches(data, steps=1):
            private.accumulate(losses_of(model, batch.examples))
            private.release()
    assert all(p.grad.isfinite().all() for p in model.parameters())
