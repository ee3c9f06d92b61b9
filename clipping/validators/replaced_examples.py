# SPDX-License-Identifier: Apache-2.0
"""The inputs of one call of a model, with some examples replaced by others of the same batch.

Shapes: N rows, B examples.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipping.modules.heard_calls import Key
from clipping.reruns.nested_values import Structure, flatten, unflatten

LARGE, SMALL = 1e3, 1e-3
"""Factors of the numbers of examples that are put in the place of others."""

BLOCKS, CYCLES = "blocks", "cycles"
"""How rows may lie in the inputs, where there are several for each example."""

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, nn.Module, type)

Dims = Sequence[int | None]
"""The dimension of the rows in each leaf of the inputs; None where it has none."""


class Plan(NamedTuple):
    """Rows to put in the place of each row, (N,), which rows stay as they are, (N,), and the factor of the others.

    `longer` are the shapes in a run of more rows, where they are known.
    """

    take: Tensor
    stay: Tensor
    scale: float
    longer: Mapping[Key, tuple[int, ...]] | None = None

    def scales(self) -> Tensor:
        """The factor of each row, (N,)."""
        return torch.where(self.stay, 1.0, self.scale)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The leaves of the inputs, copied; the number of rows is that of the first tensor."""

    leaves: Sequence[object]
    structure: Structure
    dims: Dims
    num_rows: int
    num_examples: int
    turn: int = 0

    @staticmethod
    def of(args: Any, kwargs: Any, batch_dim: int, num_examples: int | None, turn: int = 0) -> Inputs:
        """Those of a call, whose rows are of `num_examples`; None: each row is an example.

        Fewer rows than examples are a part of them that the loop has cut.
        """
        leaves, structure = flatten((args, kwargs))
        sizes = [
            x.shape[batch_dim if x.dim() > batch_dim else 0]
            for x in leaves
            if isinstance(x, Tensor) and x.dim() > 0
        ]
        fits = (n for n in sizes if num_examples and n and n % num_examples == 0)
        num_rows = next(fits, sizes[0] if sizes else 0)
        if num_examples and num_rows < num_examples:
            num_examples = None
        dims = [_dim(x, num_rows, batch_dim) for x in leaves]
        return Inputs([own(x) for x in leaves], structure, dims, num_rows, num_examples or num_rows, turn)

    @property
    def several(self) -> bool:
        """Whether there are several examples, and it is known which rows are theirs."""
        return self.num_examples > 1 and self.num_rows > 1 and self.num_rows % self.num_examples == 0

    @property
    def orders(self) -> list[str]:
        """The orders in which the rows may lie."""
        return [BLOCKS] if self.num_rows == self.num_examples else [BLOCKS, CYCLES]

    def arguments(self, leaves: Sequence[object]) -> Any:
        """(args, kwargs) for a run, which may change them."""
        return unflatten([own(x) for x in leaves], self.structure)

    def plan(self, which: int, order: str) -> Plan:
        """A half of the examples stays, which of the two `which` says; one of those takes the place of each other one.

        Halves are drawn: whatever a batch is folded to, no group of its rows lies in one half at every turn.
        """
        drawn = torch.randperm(
            self.num_examples,
            generator=torch.Generator(device="cpu").manual_seed(self.turn // 2),
            device="cpu",
        )
        place = torch.arange(self.num_examples, device="cpu")
        other = torch.where(place % 2 == which, place, place + (1 if which else -1))
        other = torch.where(other >= self.num_examples, place - 1, other)
        partner, stays = (
            torch.empty_like(drawn),
            torch.empty(self.num_examples, dtype=torch.bool, device="cpu"),
        )
        partner[drawn], stays[drawn] = drawn[other], place % 2 == which
        times, rows = self.num_rows // self.num_examples, torch.arange(self.num_rows, device="cpu")
        if order == BLOCKS:
            owners, take = rows // times, partner[rows // times] * times + rows % times
        else:
            owners = rows % self.num_examples
            take = rows // self.num_examples * self.num_examples + partner[owners]
        return Plan(take, stays[owners], SMALL if (which + self.turn) % 2 else LARGE)

    def others(self, plan: Plan, dims: Dims) -> list[object]:
        """The leaves with other examples, in the dimensions `dims`."""
        found: list[object] = []
        for x, dim in zip(self.leaves, dims, strict=True):
            if isinstance(x, Tensor) and dim is not None:
                value = x.detach().index_select(dim, plan.take.to(x.device))
                if value.is_floating_point():
                    value = value * along(plan.scales().to(value), value, dim)
                x = value.requires_grad_(x.requires_grad)
            found.append(x)
        return found

    def one_more(self, dims: Dims) -> list[object]:
        """The leaves with one example more, in the dimensions `dims`."""
        times = self.num_rows // self.num_examples
        rows = torch.cat([torch.arange(self.num_rows, device="cpu"), torch.arange(times, device="cpu")])
        return [
            x.detach().index_select(dim, rows.to(x.device)).requires_grad_(x.requires_grad)
            if isinstance(x, Tensor) and dim is not None
            else x
            for x, dim in zip(self.leaves, dims, strict=True)
        ]


def along(values: Tensor, target: Tensor, dim: int) -> Tensor:
    """`values` (N,) as they multiply `target` along `dim`."""
    shape = [1] * target.dim()
    shape[dim] = -1
    return values.reshape(shape)


def own(value: object) -> Any:
    """A copy of an input, which the model may change."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value if isinstance(value, _PLAIN) or callable(value) else copy.deepcopy(value)


def _dim(value: object, num_rows: int, batch_dim: int) -> int | None:
    if not isinstance(value, Tensor):
        return None
    found = (d for d in dict.fromkeys((batch_dim, 0)) if value.dim() > d and value.shape[d] == num_rows)
    return next(found, None)
