# SPDX-License-Identifier: Apache-2.0
"""From recorded structures to the clipped sum: norms, weights, one weighted sum per parameter.

Shapes: B examples, K groups of parameters, T positions, P outputs, D inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clipping.clippers import Clipper
from clipping.grads import Dense, SampleGrads
from clipping.outer import Outer

KEEP_COST = 24
"""Cost of one pass over a formed gradient element, in multiply-adds (measured): forming pays off above it."""

KEEP_MEMORY = 2
"""How many times the memory of inputs and output gradients a formed gradient may take."""


def settled(grads: SampleGrads) -> SampleGrads:
    """`grads`, with per-example gradients formed where that is cheaper and takes about as little memory.

    Norm and sum then share one product, and inputs and output gradients can be dropped at once. The norm
    through Gram matrices costs T^2 (P + D) multiply-adds on top; forming costs about KEEP_COST P D, and holds
    P D numbers per example instead of T (P + D): adapters, convolutions over large images, narrow layers.
    """
    if not isinstance(grads, Outer):
        return grads
    _, _, positions, num_out = grads.left.shape
    num_in = grads.right.shape[-1]
    held = positions * (num_out + num_in)
    formed = num_out * num_in
    if formed <= KEEP_MEMORY * held and positions * held > KEEP_COST * formed:
        return Dense(grads.dense())
    return grads


def group_norms(
    found: Mapping[str, SampleGrads], groups: tuple[tuple[str, ...], ...], num_examples: int, scale: float
) -> Tensor:
    """(K, B): norm of each example's gradient within each group, times `scale`."""
    rows = []
    for names in groups:
        squares = [found[name].sq_norm() for name in names if name in found]
        if squares:
            dtype = torch.float64 if any(s.dtype == torch.float64 for s in squares) else torch.float32
            rows.append(torch.stack([s.to(dtype) for s in squares]).sum(0))
        else:
            rows.append(torch.zeros(num_examples))
    device = next((row.device for row in rows if row.device.type != "cpu"), torch.device("cpu"))
    dtype = torch.float64 if any(row.dtype == torch.float64 for row in rows) else torch.float32
    return torch.stack([row.to(device, dtype) for row in rows]).sqrt_() * scale


def add_clipped(
    totals: dict[str, Tensor],
    found: dict[str, SampleGrads],
    num_examples: int,
    *,
    clipper: Clipper,
    groups: tuple[tuple[str, ...], ...],
    scale: float = 1.0,
) -> None:
    """Add the clipped gradients of `num_examples` examples to `totals`, and empty `found` on the way.

    `scale` turns recorded gradients into those of each example's own loss: B where the loss was a mean.

    Guarantees
    ----------
    Each example adds a vector of norm at most `clipper.sensitivity`; one whose norm is not finite adds
    nothing, and leaves the other examples' contributions as they are
    (test_guarantee_one_example_moves_the_sum_by_at_most_the_sensitivity).
    """
    norms = group_norms(found, groups, num_examples, scale)
    weights = clipper.weights(norms) * scale
    finite = torch.isfinite(norms).all(0)
    all_finite = bool(finite.all())
    for row, names in enumerate(groups):
        for name in names:
            grads = found.pop(name, None)
            if grads is None:
                continue
            if not all_finite:
                grads = grads.masked(finite)
            totals[name] = grads.weighted_sum(weights[row], totals.get(name))
