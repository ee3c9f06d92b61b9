# SPDX-License-Identifier: Apache-2.0
"""Collectors of two backwards of one graph: the first measures, the second sums, and neither holds a structure.

Shapes: B examples, K groups of parameters.

References: Li et al. (2021), arXiv:2110.05679, section 4 (two backwards; here without scaling the losses).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from clipping.collectors.cancelling import ALONE, Fine, refined
from clipping.collectors.one_pass import Sums, masked, norms, sq_norm
from clipping.contributions.contribution import Measured
from clipping.gradients.path_costs import Choice
from clipping.gradients.sample_grads import SampleGrads
from clipping.gradients.sum import Sum
from clipping.rounding.norms import row_norm


class Measuring:
    """The first of two backwards: norms only, every structure dropped at once."""

    def __init__(self, sums: Sums) -> None:
        self._sums = sums
        self._squares: list[list[Tensor]] = [[] for _ in sums.groups]
        self.seen: dict[str, tuple[Tensor, ...]] = {}
        self.fine: dict[str, Tensor] = {}
        self.measured: list[Measured] = []
        self.num_examples = 0
        self.done = False
        self.unit: object | None = None
        sums.space.forget()

    def ready(self, name: str, grads: SampleGrads, num_examples: int) -> None:
        """Measure and drop."""
        self._sums.choices[name] = Choice(
            "two backwards", f"{type(grads).__name__.lower()}, measured and dropped"
        )
        self.seen[name] = _fingerprint(grads)
        moved = self._sums.moved(name, grads, num_examples)
        found = norms(moved, self._sums.space)
        squares = found.squares
        for fine in refined({name: moved}, {name: found}, ALONE).values():
            squares, self.fine[name] = fine.remeasured(squares), fine.index
        self._squares[self._sums.rows[name]].append(squares)

    def complete(self, num_examples: int) -> None:
        """Turn norms into weights."""
        self._sums.space.forget()
        for row, squares in enumerate(self._squares):
            absent = self._sums.absent(row, self.seen, num_examples)
            squares += [sq_norm(grads, self._sums.space) for grads in absent.values()]
        rows = enumerate(self._squares)
        self.measured = [self._sums.measured(squares, row, num_examples) for row, squares in rows]
        self.num_examples = num_examples
        self.done = True


class Summing:
    """The second of two backwards over the same graph: each parameter is summed at once with known weights.

    Guarantees
    ----------
    The sum is that of one backward where both backwards deliver the same gradients, which deterministic
    operations do: gradients are weighted when summed, never the losses, so nothing is assumed linear. Other
    parameters than in the first backward, or another norm of any example's inputs or output gradients at any
    layer, are refused (test_guarantee_another_second_backward_is_refused).
    """

    def __init__(self, sums: Sums, first: Measuring, admit: Callable[[int | None], None]) -> None:
        self._sums = sums
        self._first = first
        self._admit = admit
        self._finite = [masked(measured, wait=True) for measured in first.measured]
        self._left = set(first.seen)
        self._admitted = False
        self.unit: object | None = object()

    def ready(self, name: str, grads: SampleGrads, num_examples: int) -> None:
        """Sum and drop."""
        row = self._sums.rows[name]
        known = self._first.seen.get(name)
        same = name in self._left and self._first.num_examples == num_examples
        if not same or not _agree(known, grads):
            raise RuntimeError(
                f"expected both backwards to deliver the same gradient of {name!r}; got another one in the second, so "
                "the backward draws random numbers or depends on its order; use one backward"
            )
        self._left.discard(name)
        if not self._admitted:
            self._admit(num_examples)
            self._admitted = True
        moved = self._sums.moved(name, grads, num_examples)
        if name in self._first.fine:
            moved = Fine(moved, self._first.fine[name])
        self._sums.add(name, moved, self._first.measured[row], self._finite[row])

    def complete(self, num_examples: int) -> None:
        """Refuse a second backward that delivered less than the first."""
        if self._left:
            raise RuntimeError(
                f"expected both backwards to reach the same parameters; got none of {sorted(self._left)[:4]} in the "
                "second; use one backward"
            )
        if not self._admitted:
            self._admit(num_examples)
        for row, measured in enumerate(self._first.measured):
            self._sums.count(measured)
            for name, grads in self._sums.absent(row, self._first.seen, num_examples).items():
                self._sums.add(name, grads, measured, self._finite[row])
        self._admit(None)


def _fingerprint(grads: SampleGrads) -> tuple[Tensor, ...]:
    """(B,) norms of everything that a structure holds for each example, whatever its kind."""
    if isinstance(grads, Sum):
        return tuple(x for part in grads.parts for x in _fingerprint(part))
    held = (getattr(grads, field.name) for field in fields(grads))  # pyright: ignore[reportArgumentType]
    return tuple(row_norm(x) for x in held if isinstance(x, Tensor) and x.is_floating_point())


def _agree(known: tuple[Tensor, ...] | None, grads: SampleGrads) -> bool:
    found = _fingerprint(grads)
    pairs = zip(known or (), found, strict=False)
    same = known is not None and len(known) == len(found)
    return same and all(torch.allclose(a, b, rtol=1e-4, atol=0.0, equal_nan=True) for a, b in pairs)
