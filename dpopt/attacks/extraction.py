# SPDX-License-Identifier: Apache-2.0
"""What a language model gives away word for word: the exposure of secrets, and records it completes by itself.

The law of this file: a rank is exact, or says that it is an estimate and from how many samples. A rate is over all
records given, with its interval.

Shapes: n records, T positions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import kstest, skewnorm
from torch import nn
from transformers import PreTrainedTokenizerBase

from dpopt.attacks.canaries import Place, SecretCanary, SecretFormat, secret_ids, symbol_tokens
from dpopt.attacks.curves import CONFIDENCE, Interval, clopper_pearson
from dpopt.attacks.language_signals import batches_by_length, log_softmax, vocabulary
from dpopt.attacks.scores import FloatArray
from dpopt.attacks.signals import Seen, evaluating
from dpopt.finetune.language_model import Tokens, collate, logits

EXACT_UP_TO = 200_000
"""The largest space whose secrets are all ranked."""
NUM_SAMPLES = 4096
"""Random secrets from which the exposure in a larger space is estimated."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """How far a model prefers an inserted secret to the other secrets that could have been inserted.

    Args:
        canary: the secret.
        exposure: log2(size of the space) - log2(rank): 0 to the bits of the space; about 1.44 on average for a secret
            that was never seen.
        rank: of the secret among all, 1 the likeliest; None where it was estimated.
        sampled: exposure by rank among random secrets alone: at most log2(1 + samples). None where the rank is exact.
        fit: p value of a Kolmogorov-Smirnov test of the fitted skew normal; the estimate means little when it is
            small. None where the rank is exact.
        log_prob: log probability of the secret after its prefix, in nats.
    """

    canary: SecretCanary
    exposure: float
    rank: int | None
    sampled: float | None
    fit: float | None
    log_prob: float


@dataclass(frozen=True, slots=True, eq=False)
class Completions:
    """Which tokens of each record a model would have chosen by itself, greedily, after the true ones before.

    Greedy decoding from a prefix returns the rest word for word exactly where all of the rest is chosen.

    Args:
        chosen: n arrays of bool, one for each token after the record's first.
        log_probs: n arrays of the tokens' log probabilities.
    """

    chosen: tuple[np.ndarray, ...]
    log_probs: tuple[FloatArray, ...]

    def extracted(self, num_prefix: int) -> np.ndarray:
        """(n,): whether the first `num_prefix` tokens make the model say the rest; False where there is no rest."""
        rests = [one[max(num_prefix - 1, 0) :] for one in self.chosen]
        return np.array([len(rest) > 0 and bool(rest.all()) for rest in rests])

    def expected_tries(self, num_prefix: int) -> FloatArray:
        """(n,): samples at temperature 1 after the prefix until the rest comes once, on average."""
        rests = [one[max(num_prefix - 1, 0) :].sum() for one in self.log_probs]
        return np.exp(np.minimum(-np.array(rests), 700.0))


def exposures(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    canaries: Sequence[SecretCanary],
    *,
    exact_up_to: int = EXACT_UP_TO,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    seen: Seen | None = None,
) -> list[Exposure]:
    """The exposure of each secret (Carlini et al. 2019, The Secret Sharer).

    Where the space has at most `exact_up_to` secrets, all are ranked; they share their beginnings, so that the model is
    run once for each beginning. In a larger space a skew normal is fitted to the log perplexities of random secrets.

    Args:
        model: the language model.
        tokenizer: its own.
        canaries: the secrets, inserted or not.
        exact_up_to: the largest space to be ranked whole.
        num_samples: random secrets for a larger one.
        seed: of those.
        seen: told how many more canaries are done.

    Returns:
        One result for each canary, in their order.

    Raises:
        InputError: the tokenizer joins or splits symbols.
    """
    ranked: dict[SecretFormat, FloatArray] = {}
    results = []
    for canary in canaries:
        form = canary.format
        prefix, places = symbol_tokens(form, tokenizer)
        exact = form.size <= exact_up_to
        if form not in ranked:
            if exact:
                ranked[form] = log_probs_of_all(model, prefix, places)
            else:
                ranked[form] = log_probs_of(model, prefix, _random_rows(places, num_samples, seed))
        others = ranked[form]
        own = secret_ids(canary, places)
        if exact:
            place = 0
            for symbol in canary.secret:
                place = place * len(form.alphabet) + form.alphabet.index(symbol)
            log_prob = float(others[place])
            rank = int((others >= log_prob).sum())
            results.append(Exposure(canary, math.log2(form.size / rank), rank, None, None, log_prob))
        else:
            log_prob = float(log_probs_of(model, prefix, [own])[0])
            results.append(_estimated(canary, log_prob, others))
        if seen is not None:
            seen(1)
    return results


def log_probs_of_all(model: nn.Module, prefix: Sequence[int], places: Sequence[Place]) -> FloatArray:
    """log p of every secret after the prefix, the last symbol varying fastest: one run for each beginning.

    Args:
        model: the language model.
        prefix: token ids, at least one.
        places: the tokens that may stand at each place.

    Returns:
        (product of the alphabets' sizes,), float64, in nats.
    """
    beginnings, totals = [list(prefix)], np.zeros(1)
    for place in places:
        beginnings = [[*beginning, *place.before] for beginning in beginnings]
        steps = _next_log_probs(model, beginnings, len(place.before), place.symbols)
        totals = (totals[:, None] + steps).reshape(-1)
        beginnings = [[*beginning, token] for beginning in beginnings for token in place.symbols]
    return totals


def log_probs_of(model: nn.Module, prefix: Sequence[int], secrets: Sequence[Sequence[int]]) -> FloatArray:
    """(number of secrets,): log p of each secret, as token ids, after the prefix."""
    records = [Tokens(torch.tensor([*prefix, *secret], device="cpu"), len(prefix)) for secret in secrets]
    found = complete(model, records).log_probs
    return np.array([one[len(prefix) - 1 :].sum() for one in found])


def complete(model: nn.Module, records: Sequence[Tokens], *, seen: Seen | None = None) -> Completions:
    """One pass over the records: which of their tokens would have been chosen, and how likely each was.

    Args:
        model: the language model.
        records: n records; prompts count like the rest.
        seen: told how many more records are done.
    """
    chosen: list[np.ndarray] = [np.empty(0)] * len(records)
    found: list[FloatArray] = [np.empty(0)] * len(records)
    device = next(model.parameters()).device
    with evaluating(model):
        for indices in batches_by_length(records, vocabulary(model)):
            batch = collate([records[i] for i in indices], pad=0, device=device)
            rows, targets = logits(model, batch)[:, :-1], batch.input_ids[:, 1:]
            likely = (rows.argmax(-1) == targets).cpu().numpy()
            log_p = log_softmax(rows).gather(-1, targets[..., None])[..., 0].double().cpu().numpy()
            for row, i in enumerate(indices):
                number = len(records[i].ids) - 1
                chosen[i], found[i] = likely[row, :number], log_p[row, :number]
            if seen is not None:
                seen(len(indices))
    return Completions(tuple(chosen), tuple(found))


def rate(extracted: np.ndarray, *, confidence: float = CONFIDENCE) -> Interval:
    """The share of records that were extracted, with its two-sided Clopper-Pearson interval.

    Args:
        extracted: (n,) bool, n >= 1.
        confidence: of the interval.
    """
    hits, tries = int(extracted.sum()), len(extracted)
    return Interval(hits / tries, *clopper_pearson(hits, tries, (1 - confidence) / 2))


def _next_log_probs(
    model: nn.Module, beginnings: Sequence[list[int]], num_before: int, symbols: Sequence[int]
) -> FloatArray:
    """(beginnings, symbols): log p of the last `num_before` tokens of a beginning and of each next symbol."""
    records = [Tokens(torch.tensor(beginning, device="cpu"), 0) for beginning in beginnings]
    found = np.empty((len(records), len(symbols)))
    device = next(model.parameters()).device
    with evaluating(model):
        for indices in batches_by_length(records, vocabulary(model)):
            batch = collate([records[i] for i in indices], pad=0, device=device)
            log_p = log_softmax(logits(model, batch)[:, -1 - num_before :])
            before = batch.input_ids[:, batch.input_ids.shape[1] - num_before :]
            told = log_p[:, :-1].gather(-1, before[..., None])[..., 0].double().sum(1, keepdim=True)
            found[indices] = (told + log_p[:, -1, list(symbols)].double()).cpu().numpy()
    return found


def _estimated(canary: SecretCanary, log_prob: float, others: FloatArray) -> Exposure:
    perplexities, own = -others, -log_prob
    sampled = math.log2((len(others) + 1) / (1 + int((perplexities <= own).sum())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the search may try numbers that overflow
        fitted = skewnorm.fit(perplexities)
        below = float(skewnorm.logcdf(own, *fitted))
        fit = float(kstest(perplexities, skewnorm(*fitted).cdf).pvalue)
    most = math.log2(canary.format.size)
    exposure = most if not math.isfinite(below) else min(max(-below / math.log(2), 0.0), most)
    return Exposure(canary, exposure, None, sampled, fit, log_prob)


def _random_rows(places: Sequence[Place], number: int, seed: int) -> list[list[int]]:
    source = np.random.default_rng(seed)
    columns = []
    for place in places:
        columns += [np.full(number, token) for token in place.before]
        columns.append(np.asarray(place.symbols)[source.integers(len(place.symbols), size=number)])
    return np.stack(columns, 1).tolist()
