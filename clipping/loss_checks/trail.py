# SPDX-License-Identifier: Apache-2.0
"""The part of a graph that matters: from the root of a backward down to the outputs of private models.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from clipping.loss_checks.operations.layout import Layout
from clipping.loss_checks.operations.registry import rule_of
from clipping.loss_checks.operations.state import Rule
from clipping.recording.row_graph import points, tape_of
from clipping.recording.tap import Call, Tap

Node = Any
"""A node of torch's graph."""

_MARK = "dpopt: rows"
TAP = Tap._backward_cls  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What is known of all nodes of one class; `asked` are the saved attributes that its rule has asked for so far."""

    name: str
    rule: Rule | None
    asked: dict[str, None] = field(default_factory=dict)


class Place(NamedTuple):
    """Where the walk ends: output `number` of a node, which holds the examples of a model of `owner` as `layout` says.

    `layout` is None where no dimension is known to hold them.
    """

    number: int
    layout: Layout | None
    num_examples: int
    owner: int
    shape: tuple[int, ...]


class Inner(NamedTuple):
    """A node above the outputs: the nodes and outputs that feed it, the shapes of its outputs, and what it saved."""

    kind: Kind
    edges: tuple[tuple[int, int] | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    saved: tuple[Hashable, ...]


class Trail(NamedTuple):
    """Nodes, each after all that feed it, and what was read of them: equal steps mean the same loss."""

    nodes: list[Node]
    steps: tuple[Inner | tuple[Place, ...], ...]


_KINDS: dict[type, Kind] = {}


def _kind(node: Node) -> Kind:
    base = node.name().rpartition("::")[2].partition("Backward")[0]
    # A function of the loop's own may have any name.
    known = None if isinstance(node, BackwardCFunction) else rule_of(base)
    found = _KINDS[type(node)] = Kind(base, None) if known is None else Kind(*known)
    return found


def is_output(node: Node) -> bool:
    """Whether outputs of a model are made there."""
    return _MARK in node.metadata


def mark(outputs: Sequence[Tensor], layouts: Sequence[Layout | None], num_examples: int, owner: int) -> None:
    """Note on the graph that these are outputs of a model of `owner`, which hold the examples so."""
    for output, layout in zip(outputs, layouts, strict=True):
        if layout is not None and output.grad_fn is not None:
            metadata: Any = output.grad_fn.metadata
            place = Place(output.output_nr, layout, num_examples, owner, tuple(output.shape))
            metadata[_MARK] = (*metadata.get(_MARK, ()), place)


def trail(root: Node, batch_dim: int, order: bytes | None = None) -> Trail:
    """The trail from `root`; `order` is that of the examples in a model that was called last."""
    numbers: dict[Node, int] = {}
    nodes: list[Node] = []
    steps: list[Inner | tuple[Place, ...]] = []
    stack = [root]
    while stack:
        node = stack[-1]
        if node in numbers:
            stack.pop()
            continue
        step = node.metadata.get(_MARK) or (_tapped(node, batch_dim, order) if type(node) is TAP else None)
        if step is None:
            edges = node.next_functions
            below = [n for n, _ in edges if n is not None and n not in numbers]
            if below:
                stack += below
                continue
            step = _inner(node, edges, numbers)
        numbers[node] = len(nodes)
        nodes.append(node)
        steps.append(step)
        stack.pop()
    return Trail(nodes, tuple(steps))


def _inner(node: Node, edges: Sequence[tuple[Node, int]], numbers: dict[Node, int]) -> Inner:
    kind = _KINDS.get(type(node)) or _kind(node)
    values: list[Hashable] = []
    for attribute in kind.asked:
        value = getattr(node, attribute, None)
        # Most are numbers, names or tuples of them, as the graph shows them.
        values.append(value if value is None or type(value) in _PLAIN else _readable(value))
    return Inner(
        kind,
        tuple([None if n is None else (numbers[n], i) for n, i in edges]),
        tuple([tuple(x.shape) for x in node._input_metadata]),
        tuple(values),
    )


_PLAIN = frozenset((int, float, bool, str))


def _readable(value: object) -> Hashable:
    if isinstance(value, Tensor):
        number = value.numel() == 1 and value.device.type == "cpu"
        return value.shape, value.dtype, value.item() if number else None
    if isinstance(value, tuple | list):
        return tuple([None if isinstance(x, Tensor) else x for x in value])
    return value if isinstance(value, Hashable) else None


def _tapped(node: Node, batch_dim: int, order: bytes | None) -> tuple[Place, ...]:
    (call,) = points(node)
    assert isinstance(call, Call)
    owner, dims = id(tape_of(call)), call.dims
    found = []
    for number, metadata in enumerate(node._input_metadata):
        shape = tuple(metadata.shape)
        dim = (batch_dim if len(shape) > 2 else 0) if dims is None else dims.outputs[number]
        if call.fold is not None:
            layout, size = Layout(0, 1, call.fold.num_positions, order), call.fold.num_examples
        elif dim is None or len(shape) <= dim:
            layout, size = None, 0
        else:
            layout, size = Layout(dim, order=order), shape[dim]
        found.append(Place(number, layout, size, owner, shape))
    return tuple(found)
