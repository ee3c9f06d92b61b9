# SPDX-License-Identifier: Apache-2.0
"""What causal language models say of every token of many records, in one pass over batches of similar lengths.

The law of this file: a record's signals are those of the record alone; padding, on whatever side the tokenizer puts
it, and the records that share a batch change nothing but the last bits.

Shapes: B records of a batch, T positions, V tokens in the vocabulary, n records, N counted tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpopt.attacks.scores import FloatArray
from dpopt.attacks.signals import Seen, cached, evaluating, fingerprint
from dpopt.attacks.token_scores import TokenSignals
from dpopt.finetune.language_model import Tokens, collate, logits
from dpopt.losses import IGNORED, causal_lm_losses

LARGEST_BATCH = 1 << 22
"""How many logits one batch has at most, where it holds more than one record: few enough for a processor's caches."""


class _Part(NamedTuple):
    log_prob: Tensor
    mean: Tensor
    std: Tensor
    reference: Tensor
    expected_ratio: Tensor


def token_signals(
    model: nn.Module,
    records: Sequence[Tokens],
    *,
    references: Sequence[nn.Module] = (),
    cache: Path | None = None,
    seen: Seen | None = None,
) -> TokenSignals:
    """The signals of every counted token of `records`, for the attacks of `token_scores` and `scores`.

    Args:
        model: a causal language model of Hugging Face, or any module that is called like one.
        records: n records, each with at least one counted token after its first.
        references: models with the same vocabulary that did not see the records; their probabilities are averaged.
        cache: a folder that keeps the result under a digest of all models and records; None keeps nothing.
        seen: told how many more records are done, for a progress bar.

    Returns:
        The signals, in the order of `records`, float64.

    Raises:
        ValueError: a record has no token to score, or a reference has another vocabulary.
    """
    _require_scored(records)

    def compute() -> dict[str, NDArray]:
        return _compute(model, records, references, seen)

    parts = [model, *references, *(record.ids for record in records)]
    prompts = ",".join(str(record.num_prompt) for record in records)
    key = "" if cache is None else "tokens-" + fingerprint(prompts, *parts)
    found = cached(cache, key, compute)
    return TokenSignals(
        found["log_prob"],
        found["mean"],
        found["std"],
        found["starts"],
        found["reference"] if references else None,
        found["expected_ratio"] if references else None,
    )


def sequence_losses(
    model: nn.Module, records: Sequence[Tokens], *, cache: Path | None = None, seen: Seen | None = None
) -> FloatArray:
    """(n,): each record's mean loss over its own counted tokens: all that shadow models are asked for.

    Args:
        model: as for `token_signals`.
        records: n records.
        cache: as for `token_signals`.
        seen: told how many more records are done.
    """
    _require_scored(records)

    def compute() -> dict[str, NDArray]:
        found = np.empty(len(records))
        device = next(model.parameters()).device
        with evaluating(model):
            for indices in batches_by_length(records, vocabulary(model)):
                batch = collate([records[i] for i in indices], pad=0, device=device)
                losses = causal_lm_losses(logits(model, batch), batch.labels)
                found[indices] = losses.double().cpu().numpy()
                if seen is not None:
                    seen(len(indices))
        return {"losses": found}

    prompts = ",".join(str(record.num_prompt) for record in records)
    parts = (record.ids for record in records)
    key = "" if cache is None else "losses-" + fingerprint(prompts, model, *parts)
    return cached(cache, key, compute)["losses"]


def batches_by_length(records: Sequence[Tokens], vocabulary: int) -> Iterator[list[int]]:
    """Places of `records`, shortest first, in batches of at most `LARGEST_BATCH` logits, or of one record."""
    batch: list[int] = []
    for place in sorted(range(len(records)), key=lambda i: len(records[i].ids)):
        if batch and (len(batch) + 1) * len(records[place].ids) * vocabulary > LARGEST_BATCH:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _compute(
    model: nn.Module, records: Sequence[Tokens], references: Sequence[nn.Module], seen: Seen | None
) -> dict[str, NDArray]:
    lengths = np.array([len(record.ids) - max(record.num_prompt, 1) for record in records])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    found = {name: np.empty(starts[-1]) for name in _Part._fields}
    device = next(model.parameters()).device
    with evaluating(model, *references):
        for indices in batches_by_length(records, vocabulary(model)):
            batch = collate([records[i] for i in indices], pad=0, device=device)
            counted = batch.labels[:, 1:] != IGNORED
            chosen = [log_softmax(logits(one, batch)[:, :-1][counted]) for one in (model, *references)]
            part = _part(chosen[0], chosen[1:], batch.labels[:, 1:][counted])
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in indices])
            for name, value in part._asdict().items():
                found[name][places] = value.double().cpu().numpy()
            if seen is not None:
                seen(len(indices))
    return found | {"starts": starts}


def log_softmax(rows: Tensor) -> Tensor:
    """Log probabilities of logits along the last dimension, in float32 at least."""
    return torch.log_softmax(rows if rows.dtype == torch.float64 else rows.float(), -1)


def _part(log_p: Tensor, references: Sequence[Tensor], tokens: Tensor) -> _Part:
    own = log_p.gather(1, tokens[:, None])[:, 0]
    p = log_p.exp()
    # 0 * -inf: a token that cannot come counts nothing.
    finite = log_p.nan_to_num(neginf=0.0)
    mean = (p * finite).sum(1)
    std = (p * (finite - mean[:, None]).square()).sum(1).sqrt()
    nothing = torch.zeros_like(own)
    if not references:
        return _Part(own, mean, std, nothing, nothing)
    if any(reference.shape != log_p.shape for reference in references):
        raise ValueError(
            f"expected references with the model's vocabulary of {log_p.shape[1]} tokens; got "
            f"{[reference.shape[1] for reference in references]}; compare models that share a tokenizer"
        )
    log_q = torch.stack([reference.to(log_p) for reference in references]).logsumexp(0) - np.log(
        len(references)
    )
    ratio = (log_q.exp() * (finite - log_q.nan_to_num(neginf=0.0))).sum(1)
    return _Part(own, mean, std, log_q.gather(1, tokens[:, None])[:, 0], ratio)


def vocabulary(model: nn.Module) -> int:
    """How many tokens the model tells apart, where its configuration says so; else a guess for sizing batches."""
    found = getattr(getattr(model, "config", None), "vocab_size", None)
    return found if isinstance(found, int) else 50_000


def _require_scored(records: Sequence[Tokens]) -> None:
    empty = sum(len(record.ids) <= max(record.num_prompt, 1) for record in records)
    if empty or not records:
        raise ValueError(
            f"expected records with a token to score after the first; got {empty or 'no records at all'}"
            f"{' without' if empty else ''}; leave out empty ones, or allow more tokens than the prompt has"
        )
