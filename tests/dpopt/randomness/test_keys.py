# SPDX-License-Identifier: Apache-2.0
"""Secret by default, keyed by domain, and apart from torch's global generator."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch

from dpopt.randomness import generator, insecure_key, secret_key
from dpopt.randomness import keys as randomness
from tests.support.dpopt.private_runs import NOBODY, examples, explicit, losses_of, mlp


def numbers(source, size=2000):
    return torch.empty(size, dtype=torch.float64).normal_(generator=source)


def test_the_same_domain_gives_the_same_stream():
    key = secret_key()
    first, second = (numbers(generator(key, "noise", 3, "head.weight")) for _ in range(2))
    assert torch.equal(first, second)


def test_different_domains_keys_and_types_give_different_streams():
    key = insecure_key(0)
    domains = [("noise", 1, "a"), ("noise", 2, "a"), ("noise", 1, "b"), ("sampling", 1, "a"), ("noise", "1", "a"),
               ("noise", 11, "a"), ("noise1", "a"), ("noise", 1, "a", ""), ("no", "ise", 1, "a")]  # fmt: skip
    streams = [numbers(generator(key, *domain)) for domain in domains]
    streams += [numbers(generator(insecure_key(1), *domains[0]))]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.12


def test_the_whole_state_of_the_generator_is_keyed():
    """All 624 words come from SHAKE-256, which torch's own 32-bit seeding could never reach."""
    state = generator(insecure_key(0), "noise", 1, "a").get_state().numpy()
    words = state[24 : 24 + 8 * 624].view(np.uint64)
    assert words.max() < 2**32 and len(set(words.tolist())) == 624
    material = np.frombuffer(randomness._material(insecure_key(0), ("noise", 1, "a"), 4 * 624), dtype="<u4")
    assert np.array_equal(words, material)
    # The law of MT19937: the first outputs are numpy's for the same words, so every word is in use.
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": material.astype(np.uint32), "pos": 624}}
    expected = twister.random_raw(1300)
    source = generator(insecure_key(0), "noise", 1, "a")
    got = torch.empty(1300, dtype=torch.int64).random_(0, 2**24, generator=source).numpy()
    assert (got == expected % 2**24).all()


def test_another_state_layout_is_refused(monkeypatch):
    monkeypatch.setattr(randomness, "_STATE_OFFSET", 16)
    with pytest.raises(RuntimeError, match="expected torch's CPU generator state to hold 624 words"):
        generator(secret_key(), "noise")


def run(seed=None, rate=0.5, steps=4, **options):
    model = mlp()
    indices, gradients = [], []
    with explicit(model, noise=1.0, rate=rate, insecure_seed=seed, **options) as private:
        draw = private.draw
        private.draw = lambda n: indices.append(draw(n)) or indices[-1]
        for batch in private.batches(examples(40), steps=steps):
            if batch.examples:
                private.accumulate(losses_of(model, batch.examples))
            private.release()
            gradients.append(model[0].weight.grad.clone())
    return indices, torch.stack(gradients)


def test_an_insecure_seed_reproduces_batches_and_noise():
    (batches_a, noise_a), (batches_b, noise_b) = run(seed=5), run(seed=5)
    assert batches_a == batches_b and torch.equal(noise_a, noise_b)
    assert run(seed=6)[0] != batches_a


def test_an_insecure_bound_says_so():
    with explicit(mlp(), insecure_seed=1) as private:
        assert any("INSECURE" in line for line in private.bound(1e-5).assumptions)
    with explicit(mlp()) as private:
        assert not any("INSECURE" in line for line in private.bound(1e-5).assumptions)


def test_a_run_continued_under_the_same_seed_has_other_noise(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    first, second = (run(seed=5, rate=NOBODY, ledger=ledger)[1] for _ in range(2))
    assert not (first[:, None] == second[None]).any()


def test_one_run_entered_twice_has_other_noise():
    model = mlp()
    private, seen = explicit(model, noise=1.0, rate=NOBODY), []
    for _ in range(2):
        with private:
            for _ in private.batches(examples(2), steps=2):
                private.release()
                seen.append(model[0].weight.grad.clone())
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 4
    assert private.ledger.num_charges == 4


def test_secret_runs_differ_whatever_the_global_seed():
    outcomes = []
    for _ in range(2):
        torch.manual_seed(0)
        outcomes.append(run())
    (batches_a, noise_a), (batches_b, noise_b) = outcomes
    assert batches_a != batches_b and not (noise_a == noise_b).any()


def test_the_global_generator_is_neither_used_nor_advanced():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a = numbers(generator(insecure_key(1), "noise"))
    run(steps=2)
    model = mlp()  # seeds the global generator itself
    torch.manual_seed(3)
    with explicit(model, noise=1.0) as private:
        for batch in private.batches(examples(8), steps=2):
            private.accumulate(losses_of(model, batch.examples))
            private.release()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(a, numbers(generator(insecure_key(1), "noise")))


def test_a_key_is_neither_shown_nor_copied_nor_stored(tmp_path):
    key = insecure_key(4)
    assert "hidden" in repr(key) and key.secret.hex() not in repr(key) + str(key)
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="would repeat the noise"):
            attempt(key)
    ledger = tmp_path / "ledger.jsonl"
    with explicit(mlp(), noise=1.0, ledger=ledger) as private:
        for batch in private.batches(examples(8), steps=1):
            private.accumulate(losses_of(private.model, batch.examples))
            private.release()
        written = ledger.read_bytes()
        assert (
            private._tier.key.secret not in written and private._tier.key.secret.hex().encode() not in written
        )
    assert ledger.stat().st_mode & 0o077 == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_is_refused():
    model = mlp()
    with explicit(model, noise=1.0) as private:
        batches = private.batches(examples(8), steps=1)
        private.accumulate(losses_of(model, next(batches).examples))
        child = os.fork()
        if child == 0:
            try:
                private.release()
                code = 1
            except RuntimeError as error:
                silent = all(p.grad is None for p in model.parameters())
                code = 0 if "forked" in str(error) and silent else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        private.release()
        assert private.ledger.num_charges == 1
