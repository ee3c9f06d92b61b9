# SPDX-License-Identifier: Apache-2.0
"""Gradients seen from a public centre: what centred clipping and clipped differences measure and sum.

The law of this file: a `Shifted` means the gradients less the centre, and its norm is never below that of the
difference, however closely the two cancel.

Shapes: B examples.

References: Karimireddy et al. (2021), arXiv:2012.10333 (clipping around the previous momentum).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipping.gradients.dense import Dense
from clipping.gradients.outer import Outer
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.grams import Workspace
from clipping.rounding.norms import kept, per_example, rounding_of, row_norm, widen

SQUARES = 64
"""Machine epsilons allowed for the two squared norms, whose rounding remains when they cancel (found on x86: 24 a factor)."""


@dataclass(frozen=True, slots=True, eq=False)
class Shifted:
    """`grads` less `centre`, which is one (*shape) for all examples or one for each (B, *shape).

    The difference is never formed. Examples where `present` (B,) is False have neither gradient nor centre.

    Guarantees
    ----------
    sq_norm >= |g - c|^2 for an example's gradient g and its centre c. It is |g|^2 - 2 <g, c> + |c|^2 as computed,
    plus 2 R |c| + SQUARES eps (|g|^2 + |c|^2), with eps the epsilon of the accumulator and R = grads.rounding().
    Proof: <g, c> as computed is off by at most R |c|, the squares and their sum by at most SQUARES eps of
    themselves, and |g|^2 is what the structure promises, rounded up for where its own terms cancel. What enters a
    weighted sum is off by some eps M weight, M the terms of g: the rounding up of |g|^2 covers 2 eps M^2, the first
    margin 2 eps M |c|, and |g - c| <= M + |c|. Where a number is not finite the norm is inf. Source: own
    derivation; SQUARES is measured (test_guarantee_a_shifted_norm_bounds_the_difference,
    test_guarantee_terms_that_vanish_beside_others_are_bounded, test_the_margins_cover_measured_rounding).

    The price: a difference shorter than sqrt(2 R |c|) is taken for one of that length, so it may be clipped more
    than it need be. In float32 that is 0.03 |c| for a layer of width 768 over 128 positions and |g| = |c|.
    Rounding in the sum over many examples is relative to weight * (|g| + |c|), as in any sum of which most is
    subtracted again: a centre far longer than the clip norm costs digits of the total.
    """

    grads: SampleGrads
    centre: Tensor
    present: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.grads.shape
        if tuple(self.centre.shape) not in (tuple(shape), (self.grads.num_examples, *shape)):
            raise ValueError(
                f"expected a centre of shape {tuple(shape)}, or one for each of {self.grads.num_examples} examples; "
                f"got {tuple(self.centre.shape)}; keep one centre per parameter, shaped like it"
            )

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
        values = widen(self.grads.dense())
        centre = self.centre.to(values.dtype).expand_as(values)
        return values - (centre if self.present is None else kept(centre, self.present))

    def sq_norm(self, space: Workspace | None = None) -> Tensor:
        """(B,), rounded up, at the cost of the plain norm and one inner product."""
        grads = self.grads
        own = grads.sq_norm(space) if isinstance(grads, Outer) else grads.sq_norm()
        length = self._lengths(own.dtype)
        inner = self._only_present(grads.inner(self.centre.to(own.dtype)))
        eps = torch.finfo(own.dtype).eps
        squares = own + length.square()
        margin = 2 * grads.rounding() * length + SQUARES * eps * squares
        total = squares - 2 * inner
        # An inner product that overflows would turn the total into -inf, and the norm into zero.
        return torch.where(torch.isfinite(total), total.clamp_min(0) + margin, torch.inf)

    def inner(self, direction: Tensor) -> Tensor:
        """(B,)."""
        own = self.grads.inner(direction)
        centre = self.centre if self._each() else self.centre.unsqueeze(0)
        moved = Dense(centre.to(own.dtype)).inner(direction).expand(self.num_examples)
        return own - self._only_present(moved)

    def weighted_sum(
        self, weights: Tensor, into: Tensor | None = None, space: Workspace | None = None
    ) -> Tensor:
        """(*shape), less the centre times the sum of the weights of the examples that are present."""
        if isinstance(self.grads, Outer):
            total = self.grads.weighted_sum(weights, into, space)
        else:
            total = self.grads.weighted_sum(weights, into)
        weights = self._only_present(weights.to(total.dtype))
        centre = self.centre.to(total.dtype)
        if self._each():
            return Dense(centre).weighted_sum(-weights, total)
        return total.addcmul_(centre, weights.sum(), value=-1)

    def masked(self, keep: Tensor) -> Shifted:
        """Gradients of examples outside `keep` set to zero, centre included."""
        present = keep if self.present is None else self.present & keep
        centre = kept(self.centre, present) if self._each() else self.centre
        return Shifted(self.grads.masked(keep), centre, present)

    def part(self, examples: slice) -> Shifted:
        """Gradients of a slice of the batch."""
        centre = self.centre[examples] if self._each() else self.centre
        present = None if self.present is None else self.present[examples]
        return Shifted(self.grads.part(examples), centre, present)

    def rounding(self) -> Tensor:
        """(B,): that of the gradients and that of the centre."""
        own = self.grads.rounding()
        return own + rounding_of(self._lengths(own.dtype), 1)

    def _each(self) -> bool:
        return per_example(self.centre, self.shape)

    def _only_present(self, values: Tensor) -> Tensor:
        return values if self.present is None else kept(values, self.present)

    def _lengths(self, dtype: torch.dtype) -> Tensor:
        """(B,): norms of the centres of the examples."""
        centre = self.centre if self._each() else self.centre.unsqueeze(0)
        return self._only_present(row_norm(centre.to(dtype)).expand(self.num_examples))


def shifted(grads: SampleGrads, centre: Tensor) -> SampleGrads:
    """`grads` less `centre`: a `Shifted`, or the difference itself where the gradients are formed already.

    Formed gradients are subtracted from exactly (one rounding a number) and at the cost of the inner product
    alone, so nothing is rounded up.
    """
    found = Shifted(grads, centre)
    return Dense(found.dense()) if isinstance(grads, Dense) else found
