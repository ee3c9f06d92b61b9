# SPDX-License-Identifier: Apache-2.0
"""Gradients of ONE parameter for each of B examples, kept in the structure in which the layer made them.

The law of this file: every member means its `dense()` tensor, shape (B, *shape), and `sq_norm`, `inner`,
`weighted_sum`, `add` and `cross` agree with that tensor without forming it.

Shapes: B examples, K groups (1 except for grouped convolutions), T positions, P outputs, D inputs, V rows.

References: Goodfellow (2015), arXiv:1510.01799 (T = 1); Li et al. (2021), arXiv:2110.05679, section 4 (the
ghost norm <A A^T, G G^T>); Bu et al. (2022), arXiv:2210.00038 (one weighted product instead of B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class SampleGrads(Protocol):
    """Per-example gradients of one parameter of shape `shape`, for `num_examples` examples.

    Guarantees
    ----------
    Sums and norms are accumulated in float32, or in float64 where the values are float64, whatever the dtype
    of the model: bfloat16 products are off by up to 10% when the positions of an example nearly cancel.
    `sq_norm` is rounded up by the most that it may err, and by the most that `weighted_sum` may for that example
    alone, for every input and not on average (`clipping.rounding.products`), so that neither the true gradient nor what
    is added exceeds it by more than 1e-5 (test_guarantee_norms_bound_gradients_that_cancel,
    test_guarantee_no_example_found_is_longer_than_its_norm); it is inf or NaN where it cannot be known.
    """

    @property
    def num_examples(self) -> int:
        """B."""
        ...

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""
        ...

    def dense(self) -> Tensor:
        """(B, *shape): the meaning of this structure, and the oracle of everything else."""
        ...

    def sq_norm(self) -> Tensor:
        """(B,): squared Euclidean norm of each example's gradient."""
        ...

    def inner(self, direction: Tensor) -> Tensor:
        """(B,): inner product with one direction (*shape) or with one direction per example (B, *shape)."""
        ...

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(*shape): sum over examples of weights[i] * gradient i, added to `into` where it is given."""
        ...

    def masked(self, keep: Tensor) -> SampleGrads:
        """The same gradients with those of examples where `keep` (B,) is False set to zero."""
        ...

    def part(self, examples: slice) -> SampleGrads:
        """The gradients of a slice of the batch, as views of what is held."""
        ...

    def rounding(self) -> Tensor:
        """(B,): most by which rounding moves `inner` with a direction of norm 1.

        It is relative to the terms that make up an example's gradient: where they cancel, it may exceed the norm.
        """
        ...


class Norms(NamedTuple):
    """Squared norms (B,), rounded up, and the part of each by which they were; None: no part that could matter."""

    squares: Tensor
    margins: Tensor | None = None

    @staticmethod
    def joined(parts: Sequence[Norms], none: Tensor) -> Norms:
        """Those of slices of a batch, one after the other; `none` are those of no example."""
        if not parts:
            return Norms(none)
        margins = [x.margins for x in parts if x.margins is not None]
        whole = torch.cat(margins) if len(margins) == len(parts) else None
        return Norms(torch.cat([x.squares for x in parts]), whole)


def norms_of(grads: SampleGrads) -> Norms:
    """The squared norms of `grads`, and how much of each is rounding up where its structure tells."""
    told: Callable[[], Norms] | None = getattr(grads, "norms", None)
    return Norms(grads.sq_norm()) if told is None else told()


def rounded_up(norms: Tensor, error: Tensor) -> Norms:
    """The squares of `norms` (B,), each of which may be too short by `error` (B,)."""
    squares = (norms + error).square()
    return Norms(squares, squares - norms.square())
