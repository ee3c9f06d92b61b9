# SPDX-License-Identifier: Apache-2.0
"""Compiled noise: its law, its accuracy beside the exact transform, its streams, and what happens without numba."""

import numpy as np
import pytest
import torch
from scipy import stats

from dpopt.randomness import insecure_key, normals
from dpopt.randomness.cipher import cipher_key
from dpopt.release import randomness_tiers

pytestmark = pytest.mark.skipif(not normals.available(), reason="needs the extra fast")

KEY = insecure_key(5)
MANY = 1 << 20


def drawn(count, *domain, std=1.0, divisor=1.0, dtype=torch.float32):
    total = torch.zeros(count, dtype=dtype)
    normals.add_normal(total, std, cipher_key(KEY, *domain), divisor)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guarantee_compiled_noise_has_the_stated_scale(dtype):
    values = drawn(MANY, "scale", std=0.7, divisor=2.0, dtype=dtype).double().numpy()
    assert stats.kstest(values, "norm", args=(0, 0.35)).pvalue > 1e-4
    for wrong in (0.98, 1.02):  # the same test sees a scale that is off by 2%
        assert stats.kstest(values, "norm", args=(0, 0.35 * wrong)).pvalue < 1e-9
    # A variance off by 1%, or fourth moment of anything but a normal, would show as well.
    assert abs(values.var() / 0.35**2 - 1) < 5 * np.sqrt(2 / MANY)
    assert abs(stats.kurtosis(values)) < 5 * np.sqrt(24 / MANY)


def test_tails_are_those_of_a_normal():
    values = np.abs(drawn(16 * MANY, "tails").numpy())
    for bound in (3, 4, 4.75):
        expected = 16 * MANY * 2 * stats.norm.sf(bound)
        assert abs((values > bound).sum() - expected) < 5 * np.sqrt(expected)
    assert values.max() < 6.77


def test_words_become_the_normals_of_box_and_muller():
    from dpopt.randomness.box_muller import add_pairs

    half = 1 << 12
    words = np.random.default_rng(0).integers(0, 1 << 32, 2 * half, dtype=np.uint32)
    words[:8] = [0, 1, 2, 1 << 31, (1 << 32) - 1, (1 << 32) - 200, 3037000500, 12345]
    words[half : half + 8] = [0, 1 << 30, 1 << 31, 3 << 30, (1 << 32) - 1, (1 << 30) - 1, 1 << 29, 7]
    uniform = (words[:half].astype(np.float64) + 0.5) / 2**32
    # The reduced angle runs from -1/8 to 1/8 of a turn within each quarter.
    angle = words[half:].astype(np.float64) + 0.5 - 2.0**29
    radius = np.sqrt(-2 * np.log(uniform))
    expected = np.concatenate(
        [radius * np.cos(angle * np.pi / 2**31), radius * np.sin(angle * np.pi / 2**31)]
    )
    total, scratch = np.zeros(2 * half, np.float32), np.empty(half, np.float32)
    add_pairs(total, words.copy(), scratch, scratch.view(np.int32), np.float32(1), np.float32(1))
    near = np.tile(uniform > 1 - 1e-5, 2)  # there float32 knows the uniform to a part of its distance from 1
    assert np.abs(total - expected)[~near].max() < 3e-6 * 7
    assert np.abs(total - expected)[near].max() < 4e-4
    assert np.isfinite(total).all()


@pytest.mark.parametrize("count", [1, 2, 3, 2 * normals.PAIRS - 1, 2 * normals.PAIRS + 1, 4 * normals.PAIRS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_added_and_divided_at_any_size(count, dtype):
    noise = drawn(count, "sizes", dtype=dtype)
    assert (noise != 0).all() and len(set(noise.tolist())) > 0.99 * count
    total = torch.full((count,), 3.0, dtype=dtype)
    normals.add_normal(total, 1.0, cipher_key(KEY, "sizes"), 4.0)
    torch.testing.assert_close(total, (3 + noise) / 4)


def test_streams_of_domains_are_independent_and_repeat_themselves():
    first, again, other = (drawn(MANY, *domain).numpy() for domain in (("a", 1), ("a", 1), ("a", 2)))
    assert (first == again).all()
    assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(MANY)
    for lag in (1, normals.PAIRS, 2 * normals.PAIRS):  # pairs share a radius, and parts a buffer
        assert abs(np.corrcoef(first[lag:], first[:-lag])[0, 1]) < 5 / np.sqrt(MANY)
        assert abs(np.corrcoef(first[lag:] ** 2, first[:-lag] ** 2)[0, 1]) < 5 / np.sqrt(MANY)


def test_the_scale_is_never_rounded_down():
    for value in (0.1, 0.7, 1 / 3, 1e-20, 12345.678):
        near = normals._float32_above(value)
        assert value <= float(near) <= value * (1 + 2e-7)


def test_without_numba_the_noise_is_torchs(monkeypatch):
    tier = randomness_tiers.tier("fast", KEY)
    cpu = torch.device("cpu")
    assert not isinstance(tier.noise(1, "w", cpu), torch.Generator)
    monkeypatch.setattr(normals, "available", lambda: False)
    source = tier.noise(1, "w", cpu)
    assert isinstance(source, torch.Generator)
    assert "AES" not in " ".join(tier.assumptions)
    total = torch.zeros(1000)
    from dpopt.mechanisms.gaussian import add_normal

    add_normal(total, 1.0, source)
    assert 0.8 < float(total.std()) < 1.2
