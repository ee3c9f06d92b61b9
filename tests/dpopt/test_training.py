# SPDX-License-Identifier: Apache-2.0
"""The explicit door: what a step accepts, what it refuses, and that the model stays the user's own."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from accountants import Gaussian, PoissonSampled, Repeated, accountant
from dpopt import Batch, Budget, BudgetExhausted, causal_lm_losses
from dpopt.budget.payments import Draw
from tests.support.dpopt.private_runs import (
    EVERYBODY,
    NOBODY,
    assert_gradients,
    clipped_mean,
    examples,
    explicit,
    leftovers,
    losses_of,
    mlp,
)


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_the_split_into_micro_batches_does_not_matter(size):
    model, data = mlp(torch.float64), examples(8, torch.float64)
    expected = clipped_mean(model, data)
    with explicit(model) as private:
        for batch in private.batches(data, steps=1):
            for part in batch.split(size):
                private.accumulate(losses_of(model, part))
                assert all(p.grad is None for p in model.parameters())
            private.release()
            assert_gradients(model, expected, tolerance=1e-12)


def test_an_empty_batch_is_a_step_of_noise_alone():
    model = mlp()
    with explicit(model, rate=NOBODY, noise=1.0) as private:
        for batch in private.batches(examples(8), steps=2):
            assert batch.examples == () and list(batch.split(4)) == []
            private.accumulate(torch.zeros(0))
            private.release()
            assert all(p.grad.any() for p in model.parameters())
        assert private.ledger.num_charges == private.steps == 2


def test_an_exception_in_the_middle_then_discard_and_retry():
    model, data = mlp(torch.float64), examples(8, torch.float64)
    expected = clipped_mean(model, data)

    class Boom(Exception):
        pass

    def fail(_):
        raise Boom

    with explicit(model) as private:
        for batch in private.batches(data, steps=1):
            private.accumulate(losses_of(model, batch.examples[:3]))
            hidden = model[:2](torch.stack([x for x, _ in batch.examples[3:]]))
            handle = hidden.register_hook(fail)  # the head is recorded already when the backward fails here
            with pytest.raises(Boom):
                private.accumulate(model[2](hidden).square().sum(1))
            handle.remove()
            assert private.sum.num_added == 3
            private.discard()
            for part in batch.split(5):
                private.accumulate(losses_of(model, part))
            private.release()
    assert_gradients(model, expected, tolerance=1e-12)


def test_an_exception_while_collecting_leaves_nothing_of_the_step(monkeypatch):
    from clipping import Sums

    model, data = mlp(torch.float64), examples(8, torch.float64)
    expected, original, calls = clipped_mean(model, data), Sums.add, []

    def half(self, *args):
        calls.append(args[0])
        if len(calls) == 2:
            raise torch.OutOfMemoryError("half-way")
        original(self, *args)

    with explicit(model) as private:
        for batch in private.batches(data, steps=1):
            monkeypatch.setattr(Sums, "add", half)
            with pytest.raises(torch.OutOfMemoryError):
                private.accumulate(losses_of(model, batch.examples))
            monkeypatch.setattr(Sums, "add", original)
            charged = private.ledger.events()
            with pytest.raises(RuntimeError, match=r"failed backward.*discard\(\)"):
                private.release()
            with pytest.raises(RuntimeError, match=r"failed backward.*discard\(\)"):
                private.accumulate(losses_of(model, batch.examples))
            assert private.ledger.events() == charged
            private.discard()
            private.accumulate(losses_of(model, batch.examples))
            private.release()
    assert_gradients(model, expected, tolerance=1e-12)


def test_old_gradients_are_cleared_even_of_parameters_frozen_since():
    model, data = mlp(), examples(8)
    losses_of(model, data).sum().backward()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with explicit(model, noise=1.0) as private:
        assert all(p.grad is None for p in model.parameters())
        for _ in private.batches(data, steps=1):
            private.release()
            optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_model(fails):
    model = mlp()
    keys = list(model.state_dict())
    try:
        with explicit(model, noise=1.0) as private:
            assert leftovers(model) != []
            for batch in private.batches(examples(8), steps=1):
                private.accumulate(losses_of(model, batch.examples))
                if fails:
                    raise KeyboardInterrupt
                private.release()
                assert list(model.state_dict()) == keys
    except KeyboardInterrupt:
        pass
    for p in model.parameters():
        assert (p.grad is None) is fails
        p.grad = None
    assert leftovers(model) == []
    losses_of(model, examples(8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_any_optimizer_and_schedule_step_on_the_released_gradient(optimizer_class):
    model = mlp()
    plain = copy.deepcopy(model)
    pair = [optimizer_class(m.parameters(), lr=0.1) for m in (model, plain)]
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in pair]
    with explicit(model, noise=0.0, clip=1e6) as private:
        for batch in private.batches(examples(8), steps=3):
            pair[1].zero_grad()
            (losses_of(plain, batch.examples).sum() / 8.0).backward()
            private.accumulate(losses_of(model, batch.examples))
            private.release()
            for optimizer, schedule in zip(pair, schedules, strict=True):
                optimizer.step()
                schedule.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Checkpointed(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, inputs):
        return checkpoint(self.body, inputs, use_reentrant=False)


def test_gradient_checkpointing_with_the_probe_on_the_first_step():
    body = mlp(torch.float64)
    model, data = Checkpointed(body), examples(8, torch.float64)
    expected = clipped_mean(body, data)
    with explicit(model) as private:
        for batch in private.batches(data, steps=2):
            private.accumulate(losses_of(model, batch.examples))
            private.release()
            assert_gradients(body, expected, tolerance=1e-12)
        assert private.sum.probing.done


def test_bfloat16_parameters_are_summed_in_float32():
    model = mlp(torch.bfloat16)
    seen = []
    with explicit(model) as private:
        for batch in private.batches(examples(8, torch.bfloat16), steps=1):
            private.accumulate(losses_of(model, batch.examples))
            seen = [total.dtype for total in private.sum.sums.totals.values()]
            private.release()
    assert set(seen) == {torch.float32}
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    exact = mlp(torch.bfloat16).float()
    expected = clipped_mean(exact, [(x.float(), y) for x, y in examples(8, torch.bfloat16)])
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.float(), expected[name], rtol=0.05, atol=5e-3)


def test_a_transformers_model_keeps_its_class_keys_and_generate():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config)
    keys, cls = list(model.state_dict()), type(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = [torch.randint(2, 20, (6,)) for _ in range(4)]
    with explicit(model, noise=1.0, expected=4.0, example_inputs={"input_ids": torch.stack(data)}) as private:
        for batch in private.batches(data, steps=2):
            for part in batch.split(2):
                tokens = torch.stack(part)
                private.accumulate(causal_lm_losses(model(input_ids=tokens).logits, tokens))
            private.release()
            optimizer.step()
        made = model.generate(torch.tensor([[2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=1)
        assert made.shape[0] == 1 and type(model) is cls and list(model.state_dict()) == keys


def test_budget_exhausted_before_the_first_step_and_for_too_many():
    with pytest.raises(BudgetExhausted, match=r"room for 0 after 0 step"):
        explicit(mlp(), noise=0.1, budget=Budget(0.5, 1e-5)).__enter__()
    with explicit(mlp(), noise=2.0, budget=Budget(10.0, 1e-5)) as private:
        with pytest.raises(BudgetExhausted, match="expected 1000 more step"):
            next(private.batches(examples(8), steps=1000))
        assert private.ledger.num_charges == 0
    with pytest.raises(BudgetExhausted):
        explicit(mlp(), noise=0.0, budget=Budget(10.0, 1e-5)).__enter__()


def test_a_run_entered_again_has_what_is_left_of_its_budget():
    private = explicit(mlp(), noise=4.0, budget=Budget(10.0, 1e-5))
    with private:
        most = private.steps_left
        for _ in private.batches([], steps=most // 2):
            private.release()
    with private:
        assert private.steps_left == most - most // 2
        for _ in private.batches([], steps=private.steps_left):
            private.release()
        assert private.steps_left == 0 and private.epsilon(1e-5) <= 10.0


def test_a_continued_ledger_counts_the_earlier_charges(tmp_path):
    ledger, options = tmp_path / "ledger.jsonl", {"rate": 0.1, "noise": 1.0}
    with explicit(mlp(), ledger=ledger, **options) as private:
        for _ in private.batches(examples(8), steps=3):
            private.release()
        alone = private.epsilon(1e-5)
    assert private.epsilon(1e-5) == alone  # after the end, too
    with explicit(mlp(), ledger=ledger, budget=Budget(alone * 1.3, 1e-5), **options) as private:
        assert private.epsilon(1e-5) == alone
        left = private.steps_left
        for _ in private.batches(examples(8), steps=left):
            private.release()
        total = accountant("rdp").curve(Repeated(PoissonSampled(0.1, Gaussian(1.0)), 3 + left))
        assert private.epsilon(1e-5) == pytest.approx(total.epsilon(1e-5), rel=1e-12)
        assert alone < private.epsilon(1e-5) <= alone * 1.3
    with pytest.raises(BudgetExhausted):
        explicit(mlp(), ledger=ledger, budget=Budget(alone * 1.3, 1e-5), **options).__enter__()


def test_default_ledgers_are_one_for_each_run(tmp_path):
    for number in (1, 2):
        with explicit(mlp()) as private:
            assert private.ledger_path.name == f"run-{number:04d}.jsonl"
    assert sorted(p.name for p in (tmp_path / "privacy-ledgers").iterdir()) == [
        "run-0001.jsonl",
        "run-0002.jsonl",
    ]


def test_runs_made_before_either_began_have_ledgers_of_their_own():
    first, second = explicit(mlp()), explicit(mlp())
    with first, second:
        assert (first.ledger_path.name, second.ledger_path.name) == ("run-0001.jsonl", "run-0002.jsonl")
    with first:  # entered again, it continues its own
        assert first.ledger_path.name == "run-0001.jsonl"
        assert len(first.ledger.attempts) == 2


def test_a_run_entered_again_on_a_ledger_put_back_has_other_noise(tmp_path):
    model, ledger, seen = mlp(), tmp_path / "ledger.jsonl", []
    private = explicit(model, noise=1.0, rate=NOBODY, ledger=ledger)
    for _ in range(2):
        ledger.unlink(missing_ok=True)
        with private:
            for _ in private.batches(examples(8), steps=1):
                private.release()
        seen.append(model[0].weight.grad.clone())
    assert not torch.equal(*seen)


def test_a_bound_over_a_ledger_begun_under_a_public_seed_says_so(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    with explicit(mlp(), noise=1.0, ledger=ledger, insecure_seed=5):
        pass
    with explicit(mlp(), noise=1.0, ledger=ledger) as private:
        (told,) = [text for text in private.bound(1e-5).assumptions if "INSECURE" in text]
        assert "not secret (5)" in told


def test_the_ledger_holds_no_data_dependent_number(tmp_path):
    texts = []
    for rate, size in ((EVERYBODY, 8), (NOBODY, 5)):
        ledger = tmp_path / f"{size}.jsonl"
        model = mlp()
        with explicit(model, noise=1.0, rate=0.5, ledger=ledger) as private:
            private.draw = lambda n, r=rate, p=private: Draw(
                [*range(n)] if r == EVERYBODY else [], p.payments.rounds.next(n)
            )
            for batch in private.batches(examples(size), steps=2):
                if batch.examples:
                    private.accumulate(losses_of(model, batch.examples))
                private.release()
            payloads = re.findall(rb'"payload":(.*?),"prev"', ledger.read_bytes())
            texts.append(payloads[1:])  # the header names the file at random
    assert texts[0] == texts[1]


def test_mean_losses_take_the_same_per_example_losses():
    model, data = mlp(torch.float64), examples(8, torch.float64)
    expected = clipped_mean(model, data)
    with explicit(model, mean_losses=True) as private:
        for batch in private.batches(data, steps=1):
            for part in batch.split(3):
                private.accumulate(losses_of(model, part))
            private.release()
    assert_gradients(model, expected, tolerance=1e-12)


def test_a_batch_is_its_examples():
    assert [part for part in Batch((1, 2, 3)).split(2)] == [[1, 2], [3]]


def test_batches_without_a_number_run_until_the_budget_is_spent():
    with explicit(mlp(), noise=8.0, budget=Budget(3.0, 1e-5)) as private:
        wanted = private.steps_left
        taken = 0
        for _ in private.batches(examples(8)):
            private.release()
            taken += 1
        assert taken == wanted > 1 and private.steps_left == 0
        with pytest.raises(BudgetExhausted, match="room for 0"):
            next(private.batches(examples(8), steps=1))


def test_batches_without_a_number_or_a_budget_are_refused():
    with explicit(mlp()) as private, pytest.raises(ValueError, match="got neither; pass steps="):
        next(private.batches(examples(8)))
