# SPDX-License-Identifier: Apache-2.0
"""Walks the graph of a loss from its root down to the outputs of the private model.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from clipping.loss_checks.layout import Layout
from clipping.loss_checks.rules import rule_of
from clipping.loss_checks.state import Facts, Operation, Rows, Rule, State, Total, Unproven, ruled
from clipping.tap import Tap

Lookup = Callable[[Tensor, int], State]
"""What was seen of how a constant tensor was made, for a batch of so many examples."""

Node = Any

_MARK = "dpopt: rows"
_NAMES: dict[str, tuple[str, Rule | None]] = {}
_HALF, _WHOLE = 1 << 63, 1 << 64


def mark(outputs: Sequence[Tensor], dims: Sequence[int | None], num_examples: int, owner: int) -> None:
    """Note on the graph that these are outputs of the model of `owner`, with the examples in `dims`."""
    for output, dim in zip(outputs, dims, strict=True):
        if output.grad_fn is not None and dim is not None:
            known = output.grad_fn.metadata.setdefault(_MARK, {})
            known[output.output_nr] = (Layout(dim), num_examples, owner)


class Walk:
    """One walk. `names` are the operations met; `met` the owners of the outputs that were reached."""

    def __init__(
        self, facts: Facts, batch_dim: int, lookup: Lookup | None, order: bytes | None = None
    ) -> None:
        self.facts = facts
        self.names: set[str] = set()
        self.met: set[int] = set()
        self._batch_dim = batch_dim
        self._lookup = lookup
        self._order = order
        self._done: dict[Node, list[State]] = {}

    def state(self, node: Node, number: int) -> State:
        """How output `number` of `node` depends on the examples."""
        stack = [node]
        while stack:
            node_ = stack[-1]
            if node_ in self._done:
                stack.pop()
                continue
            found = self._frontier(node_)
            if found is None:
                below = [n for n, _ in node_.next_functions if n is not None and n not in self._done]
                if below:
                    stack += below
                    continue
                found = self._evaluated(node_)
            self._done[node_] = found
            stack.pop()
        return self._done[node][number]

    def _frontier(self, node: Node) -> list[State] | None:
        marks = node.metadata.get(_MARK)
        if marks is not None:
            last = max(marks)
            return [self._rows(*marks[i]) if i in marks else _UNKNOWN for i in range(last + 1)]
        if not isinstance(node, Tap._backward_cls):  # pyright: ignore[reportAttributeAccessIssue]
            return None
        return [self._tapped(node.call, i, tuple(m.shape)) for i, m in enumerate(node._input_metadata)]

    def _tapped(self, call: Any, number: int, shape: tuple[int, ...]) -> State:
        owner = id(call.deliver.__self__)
        if call.fold is not None:
            return self._rows(Layout(0, 1, call.fold.num_positions), call.fold.num_examples, owner)
        dim = self._batch_dim if len(shape) > 2 else 0
        if call.dims is not None:
            dim = call.dims.outputs[number]
        if dim is None or len(shape) <= dim:
            return _UNKNOWN
        return self._rows(Layout(dim), shape[dim], owner)

    def _rows(self, layout: Layout, num_examples: int, owner: int) -> State:
        self.met.add(owner)
        if self.facts.num_examples not in (0, num_examples):
            return Unproven("outputs for different numbers of examples in one loss", shown=False)
        self.facts.num_examples = num_examples
        return Rows(layout if self._order is None else layout._replace(order=self._order))

    def _evaluated(self, node: Node) -> list[State]:
        edges = node.next_functions
        states = [None if child is None else self._done[child][number] for child, number in edges]
        shapes = node._input_metadata
        if not any(state is not None for state in states):
            return [None] * max(1, len(shapes))
        name, rule = _named(node.name())
        self.names.add(name)
        if rule is None:
            why = next((s for s in states if isinstance(s, Unproven)), None)
            return [why or Unproven(f"an operation that is not known ({name})", shown=False)] * len(shapes)
        sizes = [None if c is None else tuple(c._input_metadata[i].shape) for c, i in edges]
        get = _Saved(node)
        if self._lookup is not None:
            why = self._traced(node, name, states, sizes)
            if why is not None:
                return [why] * len(shapes)
        operation = Operation(name, tuple(states), tuple(sizes), (), 0, get)
        return [
            ruled(rule, self.facts, operation._replace(out=tuple(m.shape), which=i))
            for i, m in enumerate(shapes)
        ]

    def _traced(
        self, node: Node, name: str, states: list[State], sizes: list[tuple[int, ...] | None]
    ) -> Unproven | None:
        """Add what was seen of the constants of a node to its inputs; one that mixes examples refuses the node."""
        assert self._lookup is not None
        operands = {"_saved_self": 0, "_saved_other": 1}
        for attribute in dir(node):
            if not attribute.startswith("_saved_"):
                continue
            value = getattr(node, attribute)
            for tensor in value if isinstance(value, tuple) else (value,):
                if not isinstance(tensor, Tensor):
                    continue
                seen, place = (
                    self._lookup(tensor, self.facts.num_examples),
                    operands.get(attribute, len(states)),
                )
                if place < len(states) and states[place] is None:
                    states[place], sizes[place] = seen, tuple(tensor.shape)
                elif isinstance(seen, Unproven) and seen.shown:
                    return seen
                elif attribute in _BESIDE and isinstance(seen, Rows | Total):
                    states.append(seen)
                    sizes.append(tuple(tensor.shape))
        return None


_UNKNOWN = Unproven("an output of the model without a dimension for the examples", shown=False)
_BESIDE = ("_saved_target", "_saved_weight", "_saved_mask", "_saved_condition", "_saved_pos_weight")


def _named(full: str) -> tuple[str, Rule | None]:
    found = _NAMES.get(full)
    if found is None:
        base = full.rpartition("::")[2].partition("Backward")[0]
        known = rule_of(base)
        found = _NAMES[full] = (base, None) if known is None else known
    return found


class _Saved:
    """The arguments that a node saved, by name."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __call__(self, name: str) -> object:
        value = getattr(self._node, f"_saved_{name}", None)
        if isinstance(value, int) and value >= _HALF:
            return value - _WHOLE
        if isinstance(value, tuple) and any(isinstance(x, int) and x >= _HALF for x in value):
            return tuple(x - _WHOLE if isinstance(x, int) and x >= _HALF else x for x in value)
        return value
