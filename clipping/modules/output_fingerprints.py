# SPDX-License-Identifier: Apache-2.0
"""Two numbers of each example's part of an output: enough to see that a run gives what the forward gave.

Shapes: B examples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipping.rounding.norms import widen


def fingerprint(rows: Tensor) -> Tensor:
    """(B, 2): the norm of each row of (B, ...), and its sum over the root of its length."""
    values = torch.view_as_real(rows) if rows.is_complex() else rows
    values = widen(values.detach()).reshape(len(values), -1)
    length = max(1, values.shape[1]) ** 0.5
    return torch.stack((torch.linalg.vector_norm(values, dim=1), values.sum(1) / length), 1)


def tolerance_of(value: Tensor) -> float:
    """How far two runs of the same code may be apart, relative to the values."""
    if value.dtype in (torch.float64, torch.complex128):
        return 1e-9
    half = value.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(value.device.type)
    return 5e-2 if half else 1e-3


def alike(first: Tensor, second: Tensor, tolerance: float) -> Tensor:
    """Whether two fingerprints agree within rounding, on their device; rows that are not finite say nothing."""
    finite = (torch.isfinite(first) & torch.isfinite(second)).all(1, keepdim=True)
    first, second = (torch.where(finite, x, 0.0) for x in (first, second))
    return ((first - second).abs() <= tolerance * (1 + second[:, :1])).all()
