# SPDX-License-Identifier: Apache-2.0
"""What one example contributes to a release: one or more clipped sums of its gradient, and a few numbers.

The law of this file: all sums of one release are made of the same gradients, moved to a public place first, with
one weight vector each; each has a clipper, so each has a sensitivity. Numbers beside them (is this norm below the
threshold?) are made of the norms alone. Everything that steers a contribution is public.

Shapes: B examples, J numbers of a count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from clipping.clippers.clipper import Clipper
from clipping.contributions.clipped_sum import Group, sum_groups
from clipping.gradients.sample_grads import SampleGrads

Moved = Callable[[str, SampleGrads, float], SampleGrads]
"""(parameter, gradients, scale) -> the gradients to clip, of `scale` times what they mean."""

Seen = Callable[[str, SampleGrads, Tensor], None]
"""(parameter, gradients that were clipped, their weights (B,)): told of each parameter before it is dropped."""


ROUND = ">"
"""What parts the number of a round from a name, where a batch is released in rounds."""


class Count(Protocol):
    """A few numbers of each example, made from its norm in one group, summed and released beside the gradients."""

    @property
    def size(self) -> int:
        """J."""
        ...

    @property
    def row(self) -> int:
        """The group whose norms are asked."""
        ...

    @property
    def sensitivity(self) -> float | None:
        """The most that one example's numbers have as Euclidean norm.

        None: together with its gradient in the group they stay within that group's clip norm.
        """
        ...

    def values(self, norms: Tensor) -> Tensor:
        """(B,) norms to (B, J) numbers."""
        ...


class Measured(NamedTuple):
    """The weights (B,) of each sum, by prefix, and the numbers (B, J) of each count, by name."""

    weights: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """What one example adds to one release.

    The gradient, moved by `moved`, is summed with the weights of `clipper`, and once more with those of each clipper
    in `beside`, under parameter names that begin with its key; all clippers have the same groups, and take the norms
    of the moved gradient. Sums whose prefix is in `hidden` are not released: they stay before the noise, and
    their clippers bound nothing. `counts` are summed under their own names. `seen` is told of every parameter.
    `of_records` gives the contribution of a backward whose rows are known records, out of `num_records`, for what
    depends on them;
    `forget` is called where a step is given up, or has ended.

    Guarantees
    ----------
    Adding or removing an example moves each released vector by at most the sensitivity of its group in
    `released`, so the sum of all by at most the root of the sum of their squares, whatever `moved` does
    (test_guarantee_every_contribution_keeps_its_sensitivity).
    """

    clipper: Clipper
    beside: Mapping[str, Clipper] = field(default_factory=dict)
    counts: Mapping[str, Count] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    moved: Moved | None = None
    seen: Seen | None = None
    of_records: Callable[[Sequence[int]], Contribution] | None = None
    num_records: int | None = None
    forget: Callable[[], None] | None = None

    @property
    def clippers(self) -> dict[str, Clipper]:
        """The clipper of each sum, by prefix; "" is the gradient's own."""
        return {"": self.clipper, **self.beside}

    def require_apart(self, names: Sequence[str]) -> None:
        """Raise ValueError for parameters named like a sum or a count beside the gradient's own."""
        keys = [prefix + name for prefix in self.clippers for name in names] + list(self.counts)
        odd = {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else set()
        odd |= {name for name in names if ROUND in name}
        if odd:
            raise ValueError(
                f"expected parameter names that no other released vector has, without {ROUND!r}; got {sorted(odd)[:4]}; "
                "rename the modules"
            )

    def released(self, groups: tuple[tuple[str, ...], ...]) -> tuple[Group, ...]:
        """The released vectors, in groups with their sensitivities; `groups` are those of the parameters."""
        found = []
        for prefix, clipper in self.clippers.items():
            if prefix not in self.hidden:
                named = tuple(tuple(prefix + name for name in names) for names in groups)
                for row, group in enumerate(sum_groups(clipper, named)):
                    within = () if prefix else self._within(row)
                    found.append(Group((*group.names, *within), group.sensitivity))
        apart = ((name, c.sensitivity) for name, c in self.counts.items())
        return (*found, *(Group((name,), bound) for name, bound in apart if bound is not None))

    def _within(self, row: int) -> tuple[str, ...]:
        return tuple(n for n, count in self.counts.items() if count.sensitivity is None and count.row == row)
