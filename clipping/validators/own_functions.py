# SPDX-License-Identifier: Apache-2.0
"""Autograd functions that a loop wrote itself, between the outputs of the model and its losses.

Their code is not known to keep examples apart. What they saved of other examples is changed, and may not move the
gradient of one; numbers that they keep for all must not change from batch to batch.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from clipping.errors import MixesExamples
from clipping.loss_checks.trail import TAP, is_output

_LARGE = 1e3
_CLOSE = 1e-5


def own_functions(losses: Tensor) -> list[Any]:
    """The nodes of such functions, from `losses` down to the layers of a model."""
    stack, seen = [losses.grad_fn], set[Any]()
    found: list[Any] = []
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen or type(node) is TAP or is_output(node):
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            found.append(node)
        stack += [below for below, _ in node.next_functions]
    return found


def _tensors(node: Any) -> list[Tensor]:
    saved = [x for x in node.saved_tensors if isinstance(x, Tensor)]
    return saved + [x for x in vars(node).values() if isinstance(x, Tensor)]


@contextmanager
def other_examples(nodes: Sequence[Any], chosen: int, num_examples: int) -> Iterator[None]:
    """What the nodes saved of all examples but `chosen` is larger inside."""
    kept: list[tuple[Tensor, Tensor]] = []
    others = [i for i in range(num_examples) if i != chosen]
    try:
        for value in (x for node in nodes for x in _tensors(node)):
            if value.is_floating_point() and value.dim() > 0 and value.shape[0] == num_examples:
                kept.append((value, value.detach().clone()))
                value.data[others] = value.data[others] * _LARGE + 1.0
        yield
    finally:
        for value, known in reversed(kept):
            value.data.copy_(known)


class Constants:
    """The numbers that a run's own functions keep for all examples, by function and name: they must never change."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str, str], Any] = {}

    def require(self, nodes: Sequence[Any], num_examples: int) -> None:
        """Raise MixesExamples where one is another than in an earlier batch."""
        for place, node in enumerate(nodes):
            for name, value in _constants(node, num_examples):
                key = place, node.name(), name
                known = self._known.setdefault(key, value)
                if not _same(known, value):
                    raise MixesExamples(
                        f"expected what the autograd function {node.name().removesuffix('Backward')!r} keeps for all examples to be "
                        f"the same in every batch; got other numbers ({name}) than in an earlier one, as a statistic of the batch "
                        "would be; keep one for each example, with the examples in the first dimension, or multiply the losses "
                        "by it outside, where a factor may follow a public schedule"
                    )


def _constants(node: Any, num_examples: int) -> Iterator[tuple[str, Any]]:
    for place, value in enumerate(node.saved_tensors):
        if isinstance(value, Tensor) and not value.requires_grad and num_examples not in value.shape:
            yield f"saved tensor {place}", value.detach().clone()
    for name, value in vars(node).items():
        if isinstance(value, Tensor) and not value.requires_grad and num_examples not in value.shape:
            yield name, value.detach().clone()
        elif isinstance(value, int | float) and not isinstance(value, bool) and value != num_examples:
            yield name, value


def _same(known: Any, value: Any) -> bool:
    if isinstance(known, Tensor) and isinstance(value, Tensor):
        if known.shape != value.shape or known.dtype != value.dtype:
            return False
        return torch.allclose(known.double(), value.double(), rtol=_CLOSE, atol=0.0, equal_nan=True)
    if isinstance(known, Tensor) or isinstance(value, Tensor):
        return False
    return abs(known - value) <= _CLOSE * abs(known)
