# SPDX-License-Identifier: Apache-2.0
"""Examples whose gradient is far shorter than its terms: measured and summed in float64, where others are not.

A norm is rounded up by what its computation may err, which is relative to the terms of the gradient. Where two
calls of a layer nearly cancel (a finite difference, a siamese loss), the bound is a visible part of the norm or
all of it, and clipping to it would leave less than the clip norm. Such examples, and only they, are done again.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from clipping.gradients.convolved import Convolved
from clipping.gradients.outer import Outer
from clipping.gradients.routed import Routed
from clipping.gradients.rows import Rows
from clipping.gradients.sample_grads import Norms, SampleGrads
from clipping.gradients.sum import Sum
from clipping.rounding.grams import Workspace
from clipping.rounding.norms import chunks, row_norm

VISIBLE = 1e-3
"""Part of an example's norm that may be rounding up, where it has at most ORDINARY positions; less where it has few."""

ALONE = 5e-3
"""The same for one parameter by itself, whose share of the whole norm is not known yet."""

ORDINARY = 1024
"""Positions up to which the rounding up of a gradient that does not cancel stays below VISIBLE (measured: 0.06%)."""


def _allowed(num_positions: int) -> float:
    """The part of VISIBLE that the rounding up of a gradient which does not cancel stays well below (measured: half)."""
    part = num_positions / ORDINARY
    return max(min(1.0, 3 * part**0.5), part)


_FINE = (Outer, Convolved, Rows, Routed, Sum)


def positions(grads: SampleGrads) -> int:
    """Of how many terms an example's gradient is the sum."""
    match grads:
        case Outer() | Convolved():
            return grads.sizes().num_positions
        case Rows() | Routed():
            return grads.values.shape[1] if isinstance(grads, Rows) else grads.left.shape[1]
        case Sum():
            return max(positions(part) for part in grads.parts)
        case _:
            return 1


def _select(grads: Any, index: Tensor) -> Any:
    """The gradients of the examples `index`, in float64."""
    if isinstance(grads, Sum):
        return Sum(tuple(_select(part, index) for part in grads.parts))
    if isinstance(grads, Convolved):
        rows = index.unsqueeze(1) * grads.repeats + torch.arange(grads.repeats, device=index.device)
        index = rows.flatten()
    found: dict[str, Any] = {}
    for field in fields(grads):
        value = getattr(grads, field.name)
        if isinstance(value, Tensor):
            value = value[index]
            found[field.name] = value.double() if value.is_floating_point() else value
    return replace(grads, **found)


def _formed(grads: SampleGrads) -> Tensor:
    """(B,): squared norms of float64 gradients, of which a chunk is formed at a time."""
    # A Gram matrix squares what cancels, and so does a cross term: the gradient itself is measured.
    if isinstance(grads, Outer | Convolved):
        return grads.formed_norms().squares
    if not isinstance(grads, Sum):
        return grads.sq_norm()
    parts = []
    for examples in chunks(grads.num_examples, grads.shape.numel()):
        some = grads.part(examples)
        parts.append((row_norm(some.dense()) + (1 + positions(some)) * some.rounding()).square())
    return torch.cat(parts)


@dataclass(frozen=True, slots=True, eq=False)
class Fine:
    """`grads`, of which the examples `index` are measured and summed in float64.

    Guarantees
    ----------
    sq_norm bounds the gradient and what `weighted_sum` adds as that of `grads` does; for the examples in `index` within
    one part in 10^5 unless they cancel to one part in 10^8 of their terms
    (test_guarantee_examples_that_cancel_keep_the_clip_norm).
    """

    grads: SampleGrads
    index: Tensor

    @property
    def num_examples(self) -> int:
        """B."""
        return self.grads.num_examples

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        return self.grads.shape

    def dense(self) -> Tensor:
        """(B, *shape)."""
        values = self.grads.dense()
        values[self.index] = _select(self.grads, self.index).dense().to(values.dtype)
        return values

    def sq_norm(self, space: Workspace | None = None) -> Tensor:
        """(B,); `space` is not used."""
        return self.remeasured(self.grads.sq_norm())

    def remeasured(self, squares: Tensor) -> Tensor:
        """`squares` (B,) with those of the examples in `index` measured anew."""
        found = _formed(_select(self.grads, self.index)).to(squares.dtype)
        return squares.index_copy(0, self.index, found)

    def inner(self, direction: Tensor) -> Tensor:
        """(B,)."""
        return self.grads.inner(direction)

    def weighted_sum(
        self, weights: Tensor, into: Tensor | None = None, space: Workspace | None = None
    ) -> Tensor:
        """(*shape)."""
        if len(self.index) < self.num_examples or into is None:
            rest = weights.index_fill(0, self.index, 0.0)
            of = self.grads
            into = (
                of.weighted_sum(rest, into, space) if isinstance(of, Outer) else of.weighted_sum(rest, into)
            )
        added = _select(self.grads, self.index).weighted_sum(weights[self.index].double())
        return into.add_(added.to(into.dtype))

    def masked(self, keep: Tensor) -> Fine:
        """Gradients of examples outside `keep` set to zero."""
        return Fine(self.grads.masked(keep), self.index)

    def part(self, examples: slice) -> Fine:
        """Gradients of a slice of the batch."""
        start, stop, _ = examples.indices(self.num_examples)
        inside = self.index[(self.index >= start) & (self.index < stop)]
        return Fine(self.grads.part(examples), inside - start)

    def rounding(self) -> Tensor:
        """(B,): that of `grads`."""
        return self.grads.rounding()


def refined(
    held: Mapping[str, SampleGrads], norms: Mapping[str, Norms], share: float = VISIBLE
) -> dict[str, Fine]:
    """Those of `held`, parameters clipped together, whose rounding up shows in the norm of some example.

    Looks at the examples, so it waits for an accelerator once.
    """
    told = [name for name in norms if norms[name].margins is not None and isinstance(held[name], _FINE)]
    if not told:
        return {}
    device = norms[told[0]].squares.device
    longest = max(positions(held[name]) for name in told)
    limit = 2 * share * _allowed(longest)
    squares = torch.stack([x.squares.to(device, torch.float64) for x in norms.values()]).sum(0)
    margins = {name: _margins(norms[name]).to(device, torch.float64) for name in told}
    margin = torch.stack(tuple(margins.values())).sum(0)
    doubtful = torch.isfinite(squares) & (margin > limit * squares)
    if not bool(doubtful.any()):
        return {}
    found = {}
    for name in told:
        chosen = doubtful & (margins[name] > limit * (squares - margin).clamp_min(0) / len(told))
        index = chosen.nonzero().squeeze(1).to(norms[name].squares.device)
        if len(index):
            found[name] = Fine(held[name], index)
    return found


def _margins(norms: Norms) -> Tensor:
    assert norms.margins is not None
    return norms.margins
