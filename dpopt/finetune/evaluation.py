# SPDX-License-Identifier: Apache-2.0
"""The loss on held-out records: on data that somebody declared public, since what is measured is shown.

Shapes: B records, T tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dpopt.finetune.language_model import Tokens, collate, logits
from dpopt.losses import causal_lm_totals


@torch.no_grad()
def mean_loss(
    model: nn.Module, records: Sequence[Tokens], *, batch_size: int, pad: int, device: torch.device
) -> float:
    """The mean next-token loss over all counted tokens of `records`, in nats; the model's mode is left as it was."""
    training = model.training
    model.eval()
    total, counted = 0.0, 0
    ordered = sorted(records, key=lambda record: len(record.ids))
    try:
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size], pad=pad, device=device)
            losses, numbers = causal_lm_totals(logits(model, batch), batch.labels)
            total += float(losses.double().sum())
            counted += int(numbers.sum())
    finally:
        model.train(training)
    return total / max(counted, 1)
