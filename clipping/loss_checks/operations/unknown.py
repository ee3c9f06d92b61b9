# SPDX-License-Identifier: Apache-2.0
"""Tries an operation without a rule: an example's part of the output must stay when the others become its copies.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from clipping.loss_checks.operations.layout import Layout
from clipping.loss_checks.operations.state import Rows, State, Total, Unproven


class Call(NamedTuple):
    """One call of an operation; `bound` are its arguments by name, `inputs` the tensors among them in order."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    bound: Mapping[str, object]
    inputs: tuple[Tensor, ...]
    writes: bool

    @staticmethod
    def of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call, bound to the schema."""
        schema = func._schema.arguments
        bound = {a.name: a.default_value for a in schema if a.has_default_value()}
        bound |= dict(zip((a.name for a in schema), args, strict=False)) | dict(kwargs)
        inputs = tuple(
            x for a in schema for x in pytree.tree_leaves(bound.get(a.name)) if isinstance(x, Tensor)
        )
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema)
        return Call(func, args, kwargs, bound, inputs, writes)


def tried(call: Call, states: Sequence[State], result: Tensor, which: int, num_examples: int) -> State:
    """How output `which` depends on the examples, found by running `call` again on copies of single examples."""
    name = call.func._schema.name.partition("::")[2]
    if any(isinstance(state, Total) for state in states):
        return Unproven(f"a function of a sum over the examples of the batch ({name})", shown=True)
    unknown = Unproven(f"an operation that is not known ({name})", shown=False)
    rows = {id(x): s.layout for x, s in zip(call.inputs, states, strict=True) if isinstance(s, Rows)}
    plain = all(layout == Layout(layout.dim) for layout in rows.values())
    tags = call.func.tags
    if call.writes or not plain or len(rows) != sum(s is not None for s in states):
        return unknown
    if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
        return unknown
    places = [d for d, size in enumerate(result.shape) if size == num_examples]
    if torch.Tag.nondeterministic_seeded not in tags:
        for chosen in dict.fromkeys((0, num_examples - 1)):
            other = _with_copies(call, rows, num_examples, chosen)
            found = other[which] if isinstance(other, tuple | list) else other
            same = found.shape == result.shape
            places = [d for d in places if same and _equal(found.select(d, chosen), result.select(d, chosen))]
    if not places:
        return Unproven(f"an operation that brings different examples together ({name})", shown=True)
    first = next(iter(rows.values())).dim
    return Rows(Layout(first if first in places else places[0]))


def _with_copies(call: Call, rows: Mapping[int, Layout], num_examples: int, chosen: int) -> Any:
    def copies(value: object) -> object:
        if not isinstance(value, Tensor) or id(value) not in rows:
            return value
        index = torch.full((num_examples,), chosen, device=value.device)
        return value.detach().index_select(rows[id(value)].dim, index)

    with torch.no_grad():
        return call.func(*pytree.tree_map(copies, call.args), **pytree.tree_map(copies, dict(call.kwargs)))


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.is_floating_point() or first.is_complex():
        tolerance = 1e-9 if first.dtype == torch.float64 else 1e-3
        return torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True)
    return torch.equal(first, second)
