# SPDX-License-Identifier: Apache-2.0
"""Nested values taken apart into leaves and put together again: what pytree opens, dataclasses and namespaces.

pytree would open a dataclass only once its class is registered for the whole process, which is its author's to do.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

DEEPEST = 16
"""Objects inside of each other that are opened at most: one may hold itself."""


class Structure(NamedTuple):
    """How leaves are put together; `opened` are objects among pytree's leaves, each with the structure of its fields."""

    spec: pytree.TreeSpec
    opened: tuple[tuple[int, object, Structure], ...] = ()


def _fields(value: object) -> dict[str, object] | None:
    """The fields of an object that can be opened."""
    if isinstance(value, Tensor | type):
        return None
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    if isinstance(value, UserDict):  # what tokenizers of transformers return
        return {"data": value.data}
    return dict(vars(value)) if type(value) is SimpleNamespace else None


def flatten(value: object, depth: int = 0) -> tuple[list[object], Structure]:
    """The leaves of `value`, and how to put others in their place together."""
    found, spec = pytree.tree_flatten(value)
    leaves: list[object] = []
    opened: list[tuple[int, object, Structure]] = []
    for position, leaf in enumerate(found):
        fields = _fields(leaf) if depth < DEEPEST else None
        if fields is None:
            leaves.append(leaf)
            continue
        below, structure = flatten(fields, depth + 1)
        leaves += below
        opened.append((position, leaf, structure))
    return leaves, Structure(spec, tuple(opened))


def unflatten(leaves: Iterable[object], structure: Structure) -> object:
    """A value of that structure with these leaves; opened objects become copies."""
    return _built(iter(leaves), structure)


def _built(supply: Iterator[object], structure: Structure) -> object:
    opened = {position: (value, below) for position, value, below in structure.opened}
    found: list[object] = []
    for position in range(structure.spec.num_leaves):
        if position not in opened:
            found.append(next(supply))
            continue
        value, below = opened[position]
        fields = _built(supply, below)
        assert isinstance(fields, dict)
        made = copy.copy(value)
        for name, field in fields.items():
            object.__setattr__(made, name, field)  # frozen ones too
        found.append(made)
    return pytree.tree_unflatten(found, structure.spec)


def floating_leaves(value: object) -> list[Tensor]:
    """The tensors of `value` through which gradients can flow."""
    return [x for x in flatten(value)[0] if is_floating(x)]  # pyright: ignore[reportReturnType]


def is_floating(value: object) -> bool:
    """Whether `value` is a tensor through which gradients can flow."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
