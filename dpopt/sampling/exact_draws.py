# SPDX-License-Identifier: Apache-2.0
"""Batches drawn exactly: what each sampler says, from a stream of words, without a rounded probability.

A sampler's own `draw` compares float64 uniforms of a statistical generator. Here the same laws are decided by words of
a cipher: coins read bits until they have fallen, orders are sorted by distinct words, bins reject a remainder.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dpopt.randomness.cipher import WordStream
from dpopt.sampling.epochs import BallsInBins, CyclicSampling, ShuffledSampling
from dpopt.sampling.fixed_size import FixedSizeSampling
from dpopt.sampling.poisson import PoissonSampling, TruncatedPoissonSampling
from dpopt.sampling.sampler import Sampling, check_length, check_step
from dpopt.sampling.users import UserSampling

EXACT = (
    BallsInBins, CyclicSampling, FixedSizeSampling, PoissonSampling, ShuffledSampling, TruncatedPoissonSampling,
    UserSampling,
)  # fmt: skip


def refuse_inexact(sampling: Sampling) -> None:
    """Raise ValueError for a sampler whose law is not known here."""
    if not isinstance(sampling, EXACT):
        raise ValueError(
            f"expected a sampler out of {[kind.__name__ for kind in EXACT]} under secure randomness; got "
            f'{type(sampling).__name__}, whose draws need torch\'s generators; use randomness="fast"'
        )


def draw(sampling: Sampling, num_records: int, stream: WordStream, step: int = 0) -> list[int]:
    """Indices of the batch of `step` of the round that the fresh `stream` draws, in increasing order.

    Guarantees
    ----------
    The law is the one that `sampling` charges, exactly, given uniform words
    (test_guarantee_inclusion_has_exactly_the_rate_in_every_bit, test_every_sampler_draws_what_it_says).
    """
    refuse_inexact(sampling)
    check_step(step, sampling.steps_per_charge)
    match sampling:
        case PoissonSampling() | UserSampling():
            return subset(num_records, sampling.sampling_rate, stream)
        case TruncatedPoissonSampling():
            if num_records > sampling.num_records:
                raise ValueError(
                    f"expected at most the public {sampling.num_records} records; got more; raise num_records before "
                    "training"
                )
            drawn = np.array(subset(num_records, sampling.sampling_rate, stream), dtype=np.int64)
            return sorted(drawn[order(drawn.size, stream)[: sampling.max_batch_size]].tolist())
        case BallsInBins(num_batches=bins):
            return np.flatnonzero(below(bins, num_records, stream) == step).tolist()
        case CyclicSampling(batch_size=size):
            check_length(num_records, sampling.num_records)
            return list(range(step * size, min((step + 1) * size, num_records)))
        case FixedSizeSampling(batch_size=size) | ShuffledSampling(batch_size=size):
            check_length(num_records, sampling.num_records)
            return sorted(order(num_records, stream)[step * size : (step + 1) * size].tolist())
    raise AssertionError(sampling)


def order(count: int, stream: WordStream) -> NDArray[np.int64]:
    """The numbers below `count` in an order drawn evenly out of all."""
    while True:
        words = stream.words(count)
        places = np.argsort(words)
        sorted_words = words[places]
        # Given that no two are equal, words have every order alike.
        if not (sorted_words[1:] == sorted_words[:-1]).any():
            return places


def below(limit: int, count: int, stream: WordStream) -> NDArray[np.int64]:
    """`count` numbers drawn evenly from 0 to `limit` - 1."""
    numbers = stream.words(count).view(np.uint64)
    last = (1 << 64) - (1 << 64) % limit - 1  # above it, a remainder would come once too often
    while (beyond := np.flatnonzero(numbers > np.uint64(last))).size:
        numbers[beyond] = stream.words(beyond.size).view(np.uint64)
    return (numbers % np.uint64(limit)).astype(np.int64)


def subset(num_records: int, rate: float, stream: WordStream) -> list[int]:
    """Indices below `num_records`, in increasing order, each included independently with probability `rate`.

    Guarantees
    ----------
    The probability is exactly the binary fraction `rate`, rounded in neither direction: a word decides unless it
    equals the next 64 bits of the rate, and then the next word decides on the next 64 bits
    (test_guarantee_inclusion_has_exactly_the_rate_in_every_bit).
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"expected 0 <= rate <= 1; got {rate}; it is batch size / number of records")
    if rate == 1:
        return list(range(num_records))
    numerator, denominator = rate.as_integer_ratio()
    threshold, rest = divmod(numerator << 64, denominator)
    words = stream.words(num_records).view(np.uint64)
    included = words < np.uint64(threshold)
    for index in np.flatnonzero(words == np.uint64(threshold)):
        included[index] = _below(rest, denominator, stream)
    return np.flatnonzero(included).tolist()


def _below(numerator: int, denominator: int, stream: WordStream) -> bool:
    """Whether a uniform number of [0, 1), read word by word, lies below numerator / denominator < 1."""
    while numerator:
        threshold, numerator = divmod(numerator << 64, denominator)
        word = stream.integer()
        if word != threshold:
            return word < threshold
    return False
