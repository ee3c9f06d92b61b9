# SPDX-License-Identifier: Apache-2.0
"""The cipher's stream: known answers, no repeats, and draws that have the rate in every bit."""

import sys
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from dpopt import PoissonSampling
from dpopt.randomness import insecure_key, secret_key
from dpopt.randomness.cipher import CipherKey, cipher_key, require_cryptography
from dpopt.sampling import FixedSizeSampling, TruncatedPoissonSampling
from dpopt.sampling.epochs import BallsInBins, CyclicSampling, ShuffledSampling
from dpopt.sampling.exact_draws import below, draw, order, refuse_inexact, subset
from dpopt.sampling.users import UserSampling
from tests.support.dpopt.inclusion import DRAWS, RATE, RECORDS, SMALL, matrix, p_values
from tests.support.dpopt.scripted_words import Scripted

ZERO = CipherKey(bytes(32))


def test_known_answers():
    """NIST AESAVS: AES-256 of the zero block under the zero key; and each block as the bare cipher gives it."""
    first = ZERO.stream().words(2).tobytes()
    assert first.hex() == "dc95c078a2408989ad48a21492842087"
    key = CipherKey(bytes(range(32)))
    bare = Cipher(algorithms.AES(key.secret), modes.ECB()).encryptor()
    for part in (0, 1, 5, 2**64 - 1):
        counters = b"".join((part * 2**64 + i).to_bytes(16, "big") for i in range(70_000))
        assert key.stream(part).words(140_000).tobytes() == bare.update(counters)


def test_a_stream_goes_on_where_it_stopped():
    whole, pieces = ZERO.stream(), ZERO.stream()
    sizes = (1, 0, 3, 40_000, 7, 32_768)
    assert np.array_equal(whole.words(sum(sizes)), np.concatenate([pieces.words(n) for n in sizes]))
    integer = ZERO.stream().integer()
    assert integer == int.from_bytes(ZERO.stream().words(1).tobytes(), sys.byteorder)


def test_no_stream_repeats_across_names_steps_and_parts():
    key = insecure_key(0)
    domains = [("noise", 1, "a"), ("noise", 2, "a"), ("noise", 1, "b"), ("noise", "1", "a"), ("sampling", 1)]
    streams = [cipher_key(key, *domain).stream(part) for domain in domains for part in (0, 1, 2)]
    streams += [
        cipher_key(insecure_key(1), *domains[0]).stream(),
        cipher_key(secret_key(), *domains[0]).stream(),
    ]
    words = np.concatenate([stream.words(20_000) for stream in streams])
    assert np.unique(words).size == words.size  # 340 000 of 2^64 words meet with probability 3e-9
    assert np.array_equal(words[:20_000], cipher_key(key, *domains[0]).stream().words(20_000))
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 6 * 0.5 / words.size**0.5


def test_a_part_that_would_meet_another_is_refused():
    for part in (-1, 2**64):
        with pytest.raises(ValueError, match=r"expected 0 <= part < 2\^64"):
            ZERO.stream(part)


def test_a_cipher_key_is_not_shown():
    key = cipher_key(secret_key(), "noise")
    assert "hidden" in repr(key) and key.secret.hex() not in repr(key) + str(key)


def test_without_the_library_nothing_is_drawn(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(ImportError, match=r"pip install 'dpopt\[secure\]'"):
        require_cryptography()


def draws(rate):
    key = insecure_key(0)
    return matrix([subset(RECORDS, rate, cipher_key(key, "sampling", i).stream()) for i in range(DRAWS)])


def test_inclusion_is_independent_at_the_stated_rate():
    assert min(p_values(draws(RATE), RATE).values()) > SMALL
    assert p_values(draws(1.02 * RATE), RATE)["total"] < SMALL


@pytest.mark.parametrize("rate", [0.3, 0.5, 1 / 3, 1e-3, 2.0**-70, 1e-30, 1 - 2**-53])
def test_guarantee_inclusion_has_exactly_the_rate_in_every_bit(rate):
    """The probability, read off the decisions: at each level, the words below a threshold include."""
    probability, ties = Fraction(0), []
    for level in range(1, 20):
        low, high = 0, 2**64  # words below `low` include, from `high` on they do not, or tie
        while low < high:
            middle = (low + high) // 2
            try:
                taken = subset(1, rate, Scripted(*ties, middle)) == [0]
            except IndexError:  # asks for more: a tie
                taken = False
            low, high = (middle + 1, high) if taken else (low, middle)
        probability += Fraction(low, 2 ** (64 * level))
        ties.append(low)
        try:
            assert subset(1, rate, Scripted(*ties)) == []
            break
        except IndexError:
            continue
    assert probability == Fraction(rate)


def test_the_ends_of_the_rates():
    assert subset(5, 1.0, ZERO.stream()) == [0, 1, 2, 3, 4]
    assert subset(10_000, 0.0, ZERO.stream()) == subset(0, 0.5, ZERO.stream()) == []
    assert subset(10_000, 2.0**-60, ZERO.stream()) == []
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected 0 <= rate <= 1"):
            subset(5, rate, ZERO.stream())


def test_the_size_of_draws_is_binomial():
    sizes = [len(subset(2000, 0.01, cipher_key(insecure_key(2), i).stream())) for i in range(3000)]
    observed = np.bincount(np.clip(sizes, 8, 33), minlength=34)[8:]
    law = stats.binom(2000, 0.01)
    expected = np.array([law.cdf(8), *law.pmf(range(9, 33)), law.sf(32)]) * len(sizes)
    assert stats.chisquare(observed, expected).pvalue > SMALL


def test_orders_and_bins_are_even():
    stream = ZERO.stream()
    orders = [tuple(order(4, stream).tolist()) for _ in range(24_000)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > SMALL
    assert stats.chisquare(np.bincount(below(7, 70_000, stream))).pvalue > SMALL
    # Equal words have no order: all are drawn again.
    assert order(2, Scripted(5, 5, 2**63 - 1, 3)).tolist() == [1, 0]
    largest = 2**64 - 1  # 2^64 = 1 modulo 3, so one remainder has a word too many
    assert below(3, 2, Scripted(largest, 4, 5)).tolist() == [2, 1]


def test_every_sampler_draws_what_it_says():
    def drawn(sampling, number=0, records=20):
        key = cipher_key(insecure_key(3), "sampling", number)
        return [draw(sampling, records, key.stream(), step) for step in range(sampling.steps_per_charge)]

    for epoch in (BallsInBins(4, 5.0), ShuffledSampling(20, 6), CyclicSampling(20, 6)):
        batches = drawn(epoch)
        assert sorted(i for x in batches for i in x) == list(range(20)) and all(
            x == sorted(x) for x in batches
        )
        assert (drawn(epoch, 1) == batches) == isinstance(epoch, CyclicSampling)
    sizes = {len(drawn(FixedSizeSampling(6, 20), i)[0]) for i in range(50)}
    assert sizes == {6}
    truncated = [drawn(TruncatedPoissonSampling(0.5, 9, 20, 9.0), i)[0] for i in range(2000)]
    assert max(map(len, truncated)) == 9 and min(map(len, truncated)) < 6
    counts = np.bincount(np.concatenate(truncated).astype(int), minlength=20)
    assert stats.chisquare(counts).pvalue > SMALL
    poisson, users = PoissonSampling(0.3, 6.0), UserSampling(0.3, 6.0)
    assert (
        drawn(poisson)
        == drawn(users)
        == [subset(20, 0.3, cipher_key(insecure_key(3), "sampling", 0).stream())]
    )


def test_what_a_sampler_refuses_is_refused_here_too():
    for sampling, records in ((ShuffledSampling(20, 6), 21), (FixedSizeSampling(6, 20), 19)):
        with pytest.raises(ValueError, match="expected a dataset of the public length 20"):
            draw(sampling, records, ZERO.stream())
    with pytest.raises(ValueError, match="expected at most the public 20 records"):
        draw(TruncatedPoissonSampling(0.5, 9, 20, 9.0), 21, ZERO.stream())
    with pytest.raises(ValueError, match="expected 0 <= step < 1"):
        draw(PoissonSampling(0.5, 9.0), 21, ZERO.stream(), 1)
    with pytest.raises(ValueError, match="whose draws need torch's generators"):
        refuse_inexact(object())
