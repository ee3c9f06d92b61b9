# SPDX-License-Identifier: Apache-2.0
"""Collectors: what becomes of the structures that one backward delivers, parameter by parameter.

The tape hands each parameter over as soon as nothing in this backward can add to it. `Clipping` measures it
at once and clips each group when its last parameter has come: inside the backward where there are several
groups, at its end where the group is the whole model.

Shapes: B examples, K groups of parameters.

References: Bu et al. (2022), arXiv:2210.00038 (one backward, flat); He et al. (2023), arXiv:2212.01539 (groups
clipped inside the backward). Two backwards: `clipping.collectors.two_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from clipping.collectors.cancelling import Fine, refined
from clipping.collectors.collector import Idle
from clipping.contributions.contribution import Contribution, Measured
from clipping.gradients.dense import Dense
from clipping.gradients.outer import Outer
from clipping.gradients.path_costs import DEFAULT, Choice, Costs, Sizes, choose
from clipping.gradients.sample_grads import Norms, SampleGrads, norms_of
from clipping.gradients.shifted import Shifted
from clipping.gradients.zero import Absent
from clipping.rounding.grams import Workspace


@dataclass(frozen=True, eq=False)
class Sums:
    """What all backwards of a step share: where clipped gradients go, as what contribution, under which groups.

    `mean` says that a backward starts from the mean of its examples' losses: recorded gradients are then
    multiplied by B. `keep` (B,) says which rows of this backward are examples; the rest fill a fixed shape up.
    `parameters`, by name, are needed where the contribution is moved. `choices` tells which path each parameter took last.
    """

    contribution: Contribution
    groups: tuple[tuple[str, ...], ...]
    mean: bool = False
    costs: Costs = DEFAULT
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    keep: Tensor | None = None
    totals: dict[str, Tensor] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    space: Workspace = field(default_factory=Workspace)

    @cached_property
    def rows(self) -> dict[str, int]:
        """The group of each parameter; the same for every backward."""
        return {name: row for row, names in enumerate(self.groups) for name in names}

    def scale(self, num_examples: int) -> float:
        """What turns a recorded gradient into that of the example's own loss."""
        return float(num_examples) if self.mean else 1.0

    def moved(self, name: str, grads: SampleGrads, num_examples: int) -> SampleGrads:
        """The gradients that are clipped."""
        move = self.contribution.moved
        return grads if move is None else move(name, grads, self.scale(num_examples))

    def absent(self, row: int, found: Container[str], num_examples: int) -> dict[str, SampleGrads]:
        """What is clipped of the parameters of group `row` that a backward did not reach; nothing if they stay zero."""
        if self.contribution.moved is None:
            return {}
        left = (name for name in self.groups[row] if name not in found)
        return {
            n: self.moved(n, Absent(self.parameters[n].detach(), num_examples), num_examples) for n in left
        }

    def measured(self, squares: list[Tensor], row: int, num_examples: int) -> Measured:
        """What each example adds of group `row`, from the squared norms of its parameters; 0 where not finite.

        Guarantees
        ----------
        Each example's weighted gradients, over all groups of one sum, have norm at most its clipper's sensitivity;
        one whose norm is not finite in a group, or which is not in `keep`, adds nothing there, and leaves the other
        examples as they are (test_guarantee_one_example_moves_the_sum_by_at_most_the_sensitivity).
        """
        scale = self.scale(num_examples)
        norms = _total(squares, num_examples).sqrt_() * scale
        real = torch.isfinite(norms)
        if self.keep is not None:
            real &= self.keep.to(norms.device)
        weights = {
            prefix: torch.where(real, clipper.weights(norms, row) * scale, 0.0)
            for prefix, clipper in (("", self.contribution.clipper), *self.contribution.beside.items())
        }
        counts = {
            name: torch.where(real.unsqueeze(1), count.values(norms), 0.0)
            for name, count in self.contribution.counts.items()
            if count.row == row
        }
        return Measured(weights, counts)

    def add(self, name: str, grads: SampleGrads, measured: Measured, finite: Tensor | None) -> None:
        """Add the weighted gradients of a parameter to the totals; `finite` (B,) masks examples, None: all are."""
        if finite is not None:
            grads = grads.masked(finite)
        for prefix, weights in measured.weights.items():
            key = prefix + name
            total = _weighted_sum(grads, weights, self.totals.get(key), self.space)
            if total.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"expected the sum of {name!r} in float32 or float64; got {total.dtype}, which rounds away what "
                    "norms promise; let its rule return gradients in full precision (clipping.rounding.norms.widen)"
                )
            self.totals[key] = total
        if self.contribution.seen is not None:
            self.contribution.seen(name, grads, measured.weights[""])

    def count(self, measured: Measured) -> None:
        """Add the numbers of each example to the totals."""
        for name, values in measured.counts.items():
            known = self.totals.get(name)
            total = values.sum(0)
            self.totals[name] = total if known is None else known + total


def explained(sums: Sums) -> str:
    """A table: parameter, group, path and why, in the order of the groups; parameters without a gradient last."""
    rows = [("parameter", "group", "path", "why")]
    for row, names in enumerate(sums.groups):
        for name in names:
            choice = sums.choices.get(name, Choice("-", "no gradient came yet"))
            rows.append((name, str(row), choice.path, choice.why))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join((*(x.ljust(w) for x, w in zip(row, widths, strict=False)), row[3])) for row in rows]
    costs = f"traffic {sums.costs.traffic:g} multiply-adds a number, memory cap x{sums.costs.keep_memory:g}"
    return "\n".join([*lines, f"({type(sums.contribution.clipper).__name__}; {costs})"])


def _total(squares: list[Tensor], num_examples: int) -> Tensor:
    if not squares:
        return torch.zeros(num_examples, device="cpu")
    device = next((x.device for x in squares if x.device.type != "cpu"), squares[0].device)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in squares) else torch.float32
    return torch.stack([x.to(device, dtype) for x in squares]).sum(0)


def sq_norm(grads: SampleGrads, space: Workspace) -> Tensor:
    """(B,) squared norms, through the Gram that layers share where there is one."""
    return norms(grads, space).squares


def norms(grads: SampleGrads, space: Workspace) -> Norms:
    """`sq_norm`, and how much of it is rounding up."""
    if isinstance(grads, Outer):
        return grads.norms(space)
    if isinstance(grads, Dense):
        return Norms(grads.sq_norm())
    return Norms(grads.sq_norm(space)) if isinstance(grads, Shifted) else norms_of(grads)


def _weighted_sum(grads: SampleGrads, weights: Tensor, into: Tensor | None, space: Workspace) -> Tensor:
    if isinstance(grads, Outer | Shifted | Fine):
        return grads.weighted_sum(weights, into, space)
    return grads.weighted_sum(weights, into)


class Clipping:
    """Measures each parameter as it comes; clips and adds each group once its last parameter is there.

    `admit` is called with B before the first addition to the totals, and `admit(None)` once all are added: in
    between, a failure leaves the totals with a part of these examples' gradients.
    """

    def __init__(self, sums: Sums, idle: Idle, admit: Callable[[int | None], None]) -> None:
        self._sums = sums
        self._idle = idle
        self._admit = admit
        self._held: list[dict[str, SampleGrads]] = [{} for _ in sums.groups]
        self._norms: list[dict[str, Norms]] = [{} for _ in sums.groups]
        self._open = set(range(len(sums.groups)))
        self._admitted = False
        self.unit: object | None = object()
        sums.space.forget()  # what a failed backward saw may lie where the next input lies

    def ready(self, name: str, grads: SampleGrads, num_examples: int) -> None:
        """Measure; clip the group where this was its last parameter."""
        row = self._sums.rows[name]
        held = self._held[row]
        found, self._sums.choices[name] = settled(grads, self._sums.costs)
        if self._sums.contribution.moved is not None:
            found = self._sums.moved(name, found, num_examples)
        held[name], space = found, self._sums.space
        self._norms[row][name] = found.norms(space) if isinstance(found, Outer) else norms(found, space)
        # One group is left to the end of the backward: until then a failure costs nothing.
        if len(self._held) > 1 and all(
            other in held or self._idle(other) for other in self._sums.groups[row]
        ):
            self._close(row, num_examples)

    def complete(self, num_examples: int) -> None:
        """Clip what is left."""
        self._sums.space.forget()
        for row in sorted(self._open):
            self._close(row, num_examples)
        if not self._admitted:
            self._admit(num_examples)
        self._admit(None)

    def _close(self, row: int, num_examples: int) -> None:
        if not self._admitted:
            self._admit(num_examples)
            self._admitted = True
        self._open.discard(row)
        found, self._norms[row] = self._norms[row], {}
        held, self._held[row] = self._held[row], {}
        squares = self._squares(held, found)
        for name, grads in self._sums.absent(row, held, num_examples).items():
            held[name] = grads
            squares.append(sq_norm(grads, self._sums.space))
        measured = self._sums.measured(squares, row, num_examples)
        finite = masked(measured, wait=len(self._held) == 1)
        self._sums.count(measured)
        for name in list(held):
            self._sums.add(name, held.pop(name), measured, finite)

    def _squares(self, held: dict[str, SampleGrads], found: dict[str, Norms]) -> list[Tensor]:
        """Squared norms; examples of `held` that cancel are measured again, where that does not stop a queue."""
        squares = {name: x.squares for name, x in found.items()}
        wait = len(self._held) == 1 or all(x.device.type == "cpu" for x in squares.values())
        # Only where rounding up is told of can it show.
        told = wait and any(x.margins is not None for x in found.values())
        for name, fine in refined(held, found).items() if told else ():
            held[name], squares[name] = fine, fine.remeasured(squares[name])
        return list(squares.values())


def masked(measured: Measured, *, wait: bool) -> Tensor | None:
    """The examples to keep; None where none must be masked.

    A zero weight does not stop NaN, so examples whose weights are all 0 are masked. To ask a GPU whether there are any
    would stop its queue; inside the backward (`wait` False) it masks without asking.
    """
    keep = torch.stack(tuple(measured.weights.values())).amax(0) > 0
    if keep.device.type == "cpu" or wait:
        return None if bool(keep.all()) else keep
    return keep


def settled(grads: SampleGrads, costs: Costs) -> tuple[SampleGrads, Choice]:
    """`grads`, formed where `choose` says so, and the choice."""
    sizes: Callable[[], Sizes] | None = getattr(grads, "sizes", None)
    if sizes is None:
        return grads, Choice(type(grads).__name__.lower(), getattr(grads, "why", "one path"))
    choice = choose(sizes(), costs)
    return (Dense(grads.dense()), choice) if choice.path == "form and keep" else (grads, choice)
