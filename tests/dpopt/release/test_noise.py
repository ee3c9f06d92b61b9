# SPDX-License-Identifier: Apache-2.0
"""The noise that reaches `.grad`: its law, its scale, and its independence of everything else.

Each statistic is first shown to reject a planted fault (a scale 2% off, a shared stream), so that passing means
something. Thresholds: a sound implementation fails one of these about once in 10^6 runs.
"""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from dpopt.randomness import generator
from dpopt.randomness.cipher import cipher_key
from dpopt.release import randomness_tiers as tiers_module
from tests.support.dpopt.normality import p_of_correlation, p_of_mean, p_of_scale, p_of_shape
from tests.support.dpopt.private_runs import NOBODY, D, examples, explicit, mlp

SMALL = 1e-7


def wide(dtype):
    """80 000 coordinates in tensors large and small, among them one of a single element."""
    return nn.Sequential(nn.Linear(D, 7), nn.Linear(7, 1), nn.Embedding(800, 100), nn.Linear(1, 2)).to(dtype)


def observed(model, *, steps, noise=1.7, clip=0.3, expected=12.5, **options):
    """The noise of every step by parameter name, standardised by the stated scale; nobody takes part."""
    seen = []
    with explicit(model, rate=NOBODY, expected=expected, noise=noise, clip=clip, **options) as private:
        for _ in private.batches(examples(2), steps=steps):
            private.release()
            scale = expected / (noise * clip)
            seen.append({n: (p.grad.double() * scale).flatten().numpy() for n, p in model.named_parameters()})
    return seen


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def noise(request):
    # A fixed key makes the outcome of the suite reproducible; test_randomness shows that secret ones differ.
    import os

    before = os.getcwd()
    os.chdir(str(request.getfixturevalue("tmp_path_factory").mktemp("noise")))
    yield observed(wide(request.param), steps=6, insecure_seed=3)
    os.chdir(before)


def everything(noise):
    return np.concatenate([values for step in noise for values in step.values()])


def test_guarantee_noise_has_the_stated_scale(noise):
    z = everything(noise)
    assert z.size > 480_000
    for fault in (0.98, 1.02):
        assert p_of_scale(fault * z) < SMALL and p_of_shape(fault * z) < SMALL
    assert p_of_shape(z + 0.02) < SMALL and p_of_mean(z + 0.02) < SMALL
    assert min(p_of_scale(z), p_of_shape(z), p_of_mean(z)) > SMALL


def test_guarantee_noise_has_the_stated_scale_in_every_tensor_and_step(noise):
    for step in noise:
        for z in step.values():
            assert min(p_of_scale(z), p_of_shape(z)) > SMALL
    # Tensors of one to 35 elements, pooled over steps.
    small = np.concatenate([z for step in noise for z in step.values() if z.size < 100])
    assert p_of_scale(3 * small) < SMALL < p_of_scale(small)


def test_noise_has_the_tails_of_a_normal(noise):
    z = np.abs(everything(noise))
    for threshold in (3.0, 4.0):
        expected = 2 * stats.norm.sf(threshold)
        assert stats.binomtest(int((z > threshold).sum()), z.size, expected).pvalue > SMALL


def test_noise_is_independent_across_tensors_steps_and_within_a_tensor(noise):
    large = [step["2.weight"] for step in noise]
    for i, a in enumerate(large):
        half = a.size // 2
        assert p_of_correlation(a[:half], a[half : 2 * half]) > SMALL
        assert p_of_correlation(a[:-1], a[1:]) > SMALL
        for b in large[:i]:
            assert p_of_correlation(a, b) > SMALL
            assert p_of_correlation(a, b + 0.05 * a) < SMALL  # a shared part of 5% is found
    for step in noise:
        values = list(step.values())
        for i, a in enumerate(values):
            for b in values[:i]:
                size = min(a.size, b.size)
                assert not np.array_equal(a[:size], b[:size])


@pytest.mark.parametrize("fault", ["one stream for all tensors", "one stream for all steps"])
def test_a_shared_stream_would_be_noticed(monkeypatch, fault):
    def forgetful(source):
        def keyed(key, use, *domain, **device):
            kept = domain[:1] if fault == "one stream for all tensors" else domain[1:]
            return source(key, use, *kept, **device)

        return keyed

    monkeypatch.setattr(tiers_module, "generator", forgetful(generator))
    monkeypatch.setattr(tiers_module, "cipher_key", forgetful(cipher_key))
    model = nn.Sequential(nn.Linear(50, 40, bias=False), nn.Linear(40, 50, bias=False))
    first, second = observed(model, steps=2, insecure_seed=3)
    pair = (first["0.weight"], first["1.weight"] if "tensors" in fault else second["0.weight"])
    assert p_of_correlation(*pair) < SMALL


def test_noise_is_drawn_in_float32_for_a_bfloat16_model():
    model = wide(torch.bfloat16)
    exact = wide(torch.float32)
    (rounded,), (precise,) = (observed(m, steps=1, insecure_seed=5) for m in (model, exact))
    assert model[2].weight.grad.dtype == torch.bfloat16
    for name, z in precise.items():
        np.testing.assert_allclose(rounded[name], z, rtol=2**-8)


def test_noise_of_parameters_in_another_memory_format():
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3)).to(memory_format=torch.channels_last)
    (step,) = observed(model, steps=1, insecure_seed=1)
    assert min(p_of_scale(z) for z in step.values()) > SMALL


def test_noise_follows_the_sensitivity_that_the_sum_carries(monkeypatch):
    from clipping import ClippedSum
    from dpopt import GaussianMechanism

    total = {"a": torch.zeros(300, 200), "b": torch.zeros(7)}
    released = GaussianMechanism(2.0).release(
        ClippedSum(total, 5.0), lambda name, device: torch.Generator().manual_seed(len(name))
    )
    assert p_of_scale(released["a"].double().flatten().numpy() / 10.0) > SMALL


def test_no_noise_only_when_asked_for_and_then_epsilon_is_infinite():
    model = mlp()
    with explicit(model, noise=0.0, rate=NOBODY) as private:
        for _ in private.batches(examples(2), steps=1):
            private.release()
        assert all(not p.grad.any() for p in model.parameters())
        assert private.epsilon(1e-5) == float("inf")
