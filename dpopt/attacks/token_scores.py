# SPDX-License-Identifier: Apache-2.0
"""What a language model says of each token of many records, and attacks that look at tokens.

Shapes: n records, N tokens of all of them together, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpopt.attacks.scores import FloatArray

SHARE = 0.2
"""The share of a record's tokens that Min-K% looks at, as in its paper."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenSignals:
    """What a model says of every counted token of n records.

    Args:
        log_prob: (N,), log p of the token that came, given those before it.
        mean: (N,), mean of log p over the vocabulary under p itself: minus the entropy.
        std: (N,), its standard deviation.
        starts: (n + 1,), record i holds the tokens starts[i] up to starts[i + 1]; none is empty.
        reference: (N,), log of the mean probability of the token under reference models; None without them.
        expected_ratio: (N,), mean over the vocabulary, under the reference, of log p - log reference: what a token
            that neither model has seen is worth, minus a Kullback-Leibler divergence.
    """

    log_prob: FloatArray
    mean: FloatArray
    std: FloatArray
    starts: NDArray[np.int64]
    reference: FloatArray | None = None
    expected_ratio: FloatArray | None = None

    @property
    def num_records(self) -> int:
        """How many records there are: n."""
        return len(self.starts) - 1

    def record_means(self, tokens: FloatArray) -> FloatArray:
        """(n,): the mean over each record of a number for each token."""
        return np.add.reduceat(tokens, self.starts[:-1]) / np.diff(self.starts)

    @property
    def losses(self) -> FloatArray:
        """(n,): each record's mean loss over its own tokens, in nats."""
        return -self.record_means(self.log_prob)

    @property
    def reference_losses(self) -> FloatArray:
        """(n,): the same of the reference."""
        return -self.record_means(_reference(self.reference))


def min_k_scores(signals: TokenSignals, *, share: float = SHARE, standardised: bool = True) -> FloatArray:
    """Min-K%++: the mean over the least likely share of tokens of (log p - mean) / deviation over the vocabulary.

    Zhang et al. 2025 (arXiv 2404.02936). It needs no other model; it was made to detect pre-training text.

    Args:
        signals: of the model under attack.
        share: in (0, 1]; at least one token of each record counts.
        standardised: False gives Min-K% (Shi et al. 2024): the mean of the lowest log p.

    Returns:
        (n,) scores.
    """
    if not 0 < share <= 1:
        raise ValueError(f"expected share in (0, 1]; got {share!r}; the paper takes {SHARE}")
    tokens = signals.log_prob
    if standardised:
        tokens = (tokens - signals.mean) / np.maximum(signals.std, 1e-6)
    lengths = np.diff(signals.starts)
    records = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((tokens, records))
    rank = np.arange(len(tokens)) - np.repeat(signals.starts[:-1], lengths)
    kept = np.maximum((lengths * share).astype(int), 1)
    counted = np.where(rank < np.repeat(kept, lengths), tokens[order], 0.0)
    return np.add.reduceat(counted, signals.starts[:-1]) / kept


def token_info_rmia(signals: TokenSignals) -> FloatArray:
    """InfoRMIA of every token: by how many nats its ratio exceeds what the reference expects of a token in its place.

    The population of a token is the vocabulary in the same context, weighted by the reference, so that the score of
    tokens that follow the reference has mean 0 (after Tao and Shokri, arXiv 2510.05582).

    Args:
        signals: with a reference.

    Returns:
        (N,) scores in nats; high ones show which tokens were memorised.
    """
    expected = _reference(signals.expected_ratio)
    return signals.log_prob - _reference(signals.reference) - expected


def token_info_rmia_scores(signals: TokenSignals) -> FloatArray:
    """InfoRMIA of tokens, averaged over each record: (n,) scores in nats."""
    return signals.record_means(token_info_rmia(signals))


def _reference(given: FloatArray | None) -> FloatArray:
    if given is None:
        raise ValueError("expected signals with a reference model; got some without; pass references=[...]")
    return given
