# SPDX-License-Identifier: Apache-2.0
"""Several losses of the same examples, a private model as a constant, and examples that may not enter a step twice."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipping import per_layer
from tests.support.dpopt.private_runs import (
    D,
    assert_gradients,
    clipped_mean,
    examples,
    explicit,
    familiar,
    leftovers,
    losses_of,
    mlp,
)

FLOAT = torch.float64


def fakes(num, seed=5):
    return torch.randn(num, D, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def both(model, inputs, fake):
    """The two losses of a discriminator, (B,) each."""
    return model(inputs).square().sum(1), (model(fake) - 1).square().sum(1)


def inputs_of(data):
    return torch.stack([x for x, _ in data])


def by_hand(model, inputs, fake, groups, *, clip=1.0, expected=8.0):
    """Each example's gradient of both losses together, clipped in each group."""
    model = copy.deepcopy(model)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, z in zip(inputs, fake, strict=True):
        model.zero_grad()
        sum(loss.sum() for loss in both(model, x[None], z[None])).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        for names in groups:
            norm = sum(grads[n].square().sum() for n in names) ** 0.5
            for n in names:
                total[n] += grads[n] * min(1.0, clip / len(groups) ** 0.5 / norm.item())
    return {name: value / expected for name, value in total.items()}


def grouped(model, kind):
    names = [name for name, _ in model.named_parameters()]
    if kind == "flat":
        return {}, [tuple(names)]
    clipper = per_layer(model, 1.0)
    return {"clipper": clipper}, clipper.groups(names)


@pytest.mark.parametrize("kind", ["flat", "per_layer"])
@pytest.mark.parametrize("how", ["one accumulate", "block", "shared forward", "two_pass"])
def test_two_losses_of_the_same_examples_are_clipped_as_one(how, kind):
    model, data = mlp(FLOAT), examples(8, FLOAT)
    options, groups = grouped(model, kind)
    inputs, fake = inputs_of(data), fakes(8)
    expected = by_hand(model, inputs, fake, groups)
    with explicit(model, two_pass=how == "two_pass", **options) as private:
        for _ in private.batches(data, steps=1):
            for rows in (slice(0, 3), slice(3, 8)):
                if how == "one accumulate":
                    private.accumulate(*both(model, inputs[rows], fake[rows]))
                    continue
                before = private.sum.num_added
                with private.same_examples():
                    if how == "shared forward":
                        first, second = both(model, inputs[rows], fake[rows])
                        first.sum().backward(retain_graph=True)
                        second.sum().backward()
                    else:
                        for index in (0, 1):
                            private.accumulate(both(model, inputs[rows], fake[rows])[index])
                    assert private.sum.num_added == before
                assert private.sum.num_added == rows.stop
            private.release()
    assert_gradients(model, expected, tolerance=1e-10)


@pytest.mark.parametrize("kind", ["flat", "per_layer"])
def test_the_familiar_door_merges_backwards_in_a_block(kind):
    model, data = mlp(FLOAT), examples(8, FLOAT)
    _, groups = grouped(model, kind)
    inputs, fake = inputs_of(data), fakes(8)
    expected = by_hand(model, inputs, fake, groups)
    engine, model, optimizer, loader = familiar(model, data, clipping=kind)
    for x, _ in loader:
        assert torch.equal(x.sort(0)[0], inputs.sort(0)[0])
        order = [int((inputs == row).all(1).nonzero()) for row in x]
        with engine.same_examples():
            real, made = both(model, x, fake[order])
            real.mean().backward()
            made.mean().backward()
            with pytest.raises(RuntimeError, match=r"same_examples\(\) to end before its sum is used"):
                engine.training.release()
        optimizer.step()
        assert_gradients(model, expected, tolerance=1e-9)
    assert engine.training.ledger.num_charges == 1


def test_a_block_that_fails_leaves_nothing():
    model, data = mlp(FLOAT), examples(8, FLOAT)
    expected = clipped_mean(model, data)
    with explicit(model) as private:
        for batch in private.batches(data, steps=1):
            with pytest.raises(ValueError, match="on the same examples; got another number of rows"):
                with private.same_examples():
                    private.accumulate(losses_of(model, batch.examples))
                    private.accumulate(losses_of(model, batch.examples[:3]))
            with pytest.raises(ZeroDivisionError), private.same_examples():
                private.accumulate(losses_of(model, batch.examples))
                raise ZeroDivisionError
            with pytest.raises(RuntimeError, match="one same_examples"), private.same_examples():
                private.same_examples().__enter__()
            assert private.sum.num_added == 0 and not private.sum.sums.totals
            with private.same_examples():
                private.accumulate(losses_of(model, batch.examples))
                private.discard()
                private.accumulate(losses_of(model, batch.examples))
            assert private.sum.num_added == 8
            private.release()
    assert_gradients(model, expected, tolerance=1e-10)


def test_a_block_outside_a_step_is_refused():
    with explicit(mlp()) as private, pytest.raises(RuntimeError, match="got one outside a step"):
        private.same_examples().__enter__()


def test_guarantee_a_paused_backward_reaches_inputs_only():
    torch.manual_seed(0)
    generator, model, data = nn.Linear(2, D, dtype=FLOAT), mlp(FLOAT), examples(8, FLOAT)
    noise = torch.randn(6, 2, dtype=FLOAT)
    model(generator(noise)).square().sum().backward()
    plain = {n: p.grad.clone() for n, p in generator.named_parameters()}
    generator.zero_grad()
    expected = clipped_mean(model, data)
    with explicit(model) as private:
        for inside in (False, True):
            for batch in private.batches(data, steps=1) if inside else [None]:
                with private.paused():
                    model(generator(noise)).square().sum().backward()
                for n, p in generator.named_parameters():
                    torch.testing.assert_close(p.grad, plain[n])
                generator.zero_grad()
                assert all(p.grad is None for p in model.parameters()) and private.sum.num_added == 0
                assert all(isinstance(p, nn.Parameter) for p in model.parameters())
                if inside:
                    assert not private.sum.probing.done
                    private.accumulate(losses_of(model, batch.examples))
                    private.release()
    assert_gradients(model, expected, tolerance=1e-10)


def test_a_recorded_forward_may_not_be_sent_back_while_paused():
    model = mlp()
    with explicit(model) as private:
        for batch in private.batches(examples(8), steps=1):
            losses = losses_of(model, batch.examples)
            with private.paused():
                with pytest.raises(RuntimeError, match="expected nothing to record while paused"):
                    losses.sum().backward()
                with pytest.raises(RuntimeError, match="paused already"):
                    private.paused().__enter__()
            private.accumulate(losses_of(model, batch.examples))
            private.release()


def test_guarantee_examples_of_another_draw_never_enter_a_step():
    model, data = mlp(), examples(8)
    with explicit(model, noise=1.0) as private:
        kept = [losses_of(model, list(data))]  # before any draw
        for batch in private.batches(data, steps=2):
            for losses in kept:
                with pytest.raises(RuntimeError, match="a forward that ran before that batch was drawn"):
                    private.accumulate(losses)
            assert private.sum.num_added == 0
            kept.append(losses_of(model, batch.examples))  # kept for the next step
            private.accumulate(losses_of(model, batch.examples))
            private.release()
        assert len(kept) == 3


def test_half_of_a_batch_twice_is_refused():
    model, data = mlp(), examples(8)
    with explicit(model, noise=1.0) as private:
        for batch in private.batches(data, steps=1):
            half = losses_of(model, batch.examples[:4])
            half.sum().backward(retain_graph=True)
            with pytest.raises(RuntimeError, match="expected one backward through each forward"):
                half.sum().backward()
            merged = losses_of(model, batch.examples[:4]) + losses_of(model, batch.examples[4:])
            private.discard()
            private.accumulate(merged)  # two examples in each row
            with pytest.raises(RuntimeError, match="every drawn example in the losses, or none"):
                private.release()
            assert private.ledger.num_charges == 0
            private.discard()
            private.release()


def test_a_failure_in_the_middle_of_the_backward_tears_the_step_until_it_is_discarded():
    model, data = mlp(FLOAT), examples(8, FLOAT)
    clipper = per_layer(model, 1.0)

    def fail(_):
        raise ZeroDivisionError

    with explicit(model, clipper=clipper) as private:
        for batch in private.batches(data, steps=1):
            private.sum.probing.done = True
            private.accumulate(
                losses_of(model, batch.examples[:2])
            )  # whose its rows are is asked now, and not again
            hidden = model[:2](inputs_of(data)[2:])
            hidden.register_hook(fail)
            with pytest.raises(ZeroDivisionError):
                private.accumulate(model[2](hidden).square().sum(1))
            inner = losses_of(model, batch.examples[:1]).sum()
            again = losses_of(model, batch.examples[:1])
            for call in (private.release, inner.backward, partial(private.accumulate, again)):
                with pytest.raises(RuntimeError, match=r"failed backward.*discard\(\)"):
                    call()
            with pytest.raises(RuntimeError, match="failed backward"), private.same_examples():
                pass
            private.discard()
            private.accumulate(losses_of(model, batch.examples))
            private.release()


def test_a_backward_inside_a_failing_one_leaves_the_step_torn():
    model, data = mlp(), examples(8)
    with explicit(model, clipper=per_layer(model, 1.0)) as private:
        for _ in private.batches(data, steps=1):
            private.sum.probing.done = True
            inner = model[:2](
                inputs_of(data)[:3]
            ).sum()  # no call of the head, which is clipped before it fails
            hidden = model[:2](inputs_of(data)[3:])

            def nested(_, inner=inner):
                inner.backward()
                raise ZeroDivisionError

            hidden.register_hook(nested)
            with pytest.raises((ZeroDivisionError, RuntimeError)):
                model[2](hidden).square().sum(1).sum().backward()
            with pytest.raises(RuntimeError, match="failed backward"):
                private.release()
            private.discard()
            private.release()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_scaler_is_refused_and_no_attribute_stays(fused, unscaled):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused or None)
    before = set(vars(optimizer))
    engine, model, optimizer, loader = familiar(model, optimizer=optimizer, noise=1.0)
    scaler = torch.amp.GradScaler("cpu")
    for x, y in loader:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        with pytest.raises(
            ValueError, match=r"expected losses as they are; got a GradScaler, .*torch.bfloat16"
        ):
            scaler.step(optimizer)
        assert engine.training.ledger.num_charges == 0
        engine.discard()
        F.cross_entropy(model(x), y).backward()
        off = torch.amp.GradScaler("cpu", enabled=False)
        off.step(optimizer)  # a scaler that is switched off is none
    assert engine.training.ledger.num_charges == 1
    engine.detach()
    model.zero_grad()
    assert set(vars(optimizer)) == before and leftovers(model, optimizer) == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", ["flat", "per_layer"])
@pytest.mark.parametrize("door", ["explicit", "familiar"])
def test_a_model_compiled_and_run_before_is_made_private(door, kind):
    torch.compiler.reset()
    model, data = mlp(FLOAT), examples(8, FLOAT)
    options, _ = grouped(model, kind)
    with explicit(copy.deepcopy(model), **options) as private:
        for batch in private.batches(data, steps=1):
            private.accumulate(losses_of(private.model, batch.examples))
            private.release()
        expected = {n: p.grad for n, p in private.model.named_parameters()}
    compiled = torch.compile(model, backend="aot_eager")
    losses_of(compiled, list(data)).sum().backward()
    if door == "explicit":
        with explicit(
            compiled, **({} if kind == "flat" else {"clipper": per_layer(compiled, 1.0)})
        ) as private:
            for batch in private.batches(data, steps=1):
                private.accumulate(losses_of(compiled, batch.examples))
                private.release()
    else:
        engine, made, optimizer, loader = familiar(compiled, data, clipping=kind)
        for x, y in loader:
            F.cross_entropy(made(x), y).backward()
            optimizer.step()
        engine.detach()
    assert_gradients(model, expected, tolerance=1e-10)
    torch.compiler.reset()
