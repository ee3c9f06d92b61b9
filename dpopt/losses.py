# SPDX-License-Identifier: Apache-2.0
"""Losses that stay one number per example, normalised by that example alone.

Shapes: B examples, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a position that does not count, as in torch and transformers."""


def causal_lm_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,): mean next-token loss of each example over its *own* counted tokens.

    `logits` (B, T, V) and `labels` (B, T) are aligned as transformers gives them: position t predicts label
    t + 1. An example without counted tokens has loss 0. The mean over the whole batch's tokens, which
    transformers computes from `labels=`, divides each example by a number that depends on the others: one
    example then moves the clipped sum by several times the clip norm.
    """
    return _token_losses(logits, labels).sum(1) / _counted(labels).clamp(min=1)


def causal_lm_totals(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Two (B,) tensors: summed next-token loss and number of counted tokens of each example, for evaluation."""
    return _token_losses(logits, labels).sum(1), _counted(labels)


def _counted(labels: Tensor) -> Tensor:
    return (labels[:, 1:] != IGNORED).sum(1)


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    targets = labels[:, 1:].to(logits.device)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat = logits[:, :-1].to(dtype).reshape(-1, logits.shape[-1])
    losses = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape)


def one_loss(losses: Sequence[Tensor]) -> Tensor:
    """(B,): the sum of losses of the same B examples."""
    shapes = [tuple(x.shape) for x in losses]
    if not losses or any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"losses must be one number per example, shape (B,); got {', '.join(map(str, shapes))}; pass "
            'reduction="none" and average over each example\'s own positions only'
        )
    return losses[0] if len(losses) == 1 else torch.stack(list(losses)).sum(0)
