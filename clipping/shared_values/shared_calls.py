# SPDX-License-Identifier: Apache-2.0
"""Gradients, for each example, of what serves all examples at once: layer calls and parameters used as they are.

From the place where a shared value meets the examples, its gradient for each example goes back through what made it,
which no example entered: B vector-Jacobian products of a small graph, and the layers' own rules at its ends.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree

from clipping.gradients.dense import Dense
from clipping.gradients.joined_rows import BLOCKS, RowMap, joined
from clipping.gradients.sample_grads import SampleGrads
from clipping.gradients.sum import add
from clipping.modules.layers import Layer, understood
from clipping.reruns.nested_values import is_floating
from clipping.rounding.exact_products import exact_products
from clipping.rounding.norms import CHUNK_ELEMENTS
from clipping.rules.registry import Inputs
from clipping.shared_values.first_meetings import Meeting

Again = Callable[[], AbstractContextManager[None]]
"""Makes the block in which a module may run again without being recorded."""


class Source(Protocol):
    """What a shared value was made of that has a gradient; `edges` are where that gradient is asked for."""

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of its parameters."""
        ...

    @property
    def edges(self) -> Sequence[Tensor | GradientEdge]:
        """Where the graph of what was made of it ends."""
        ...

    def gradients(self, found: Sequence[Tensor | None], again: Again) -> dict[str, SampleGrads]:
        """Gradients by canonical name, from those of the edges, (B, ...) each or None."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StandIn:
    """What is used in place of the parameter `name` outside of the layer that owns it."""

    name: str
    value: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """Its name."""
        return (self.name,)

    @property
    def edges(self) -> Sequence[Tensor | GradientEdge]:
        """Itself."""
        return (self.value,)

    def gradients(self, found: Sequence[Tensor | None], again: Again) -> dict[str, SampleGrads]:
        """The gradient is the parameter's."""
        return {} if found[0] is None else {self.name: Dense(found[0])}


@dataclass(frozen=True, slots=True, eq=False)
class SharedCall:
    """One call of a layer whose outputs serve all examples; `shapes` and `edges` are those of its floating outputs."""

    layer: Layer
    inputs: Inputs
    edges: Sequence[Tensor | GradientEdge]
    shapes: Sequence[torch.Size]
    autocast: Sequence[Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the layer's parameters."""
        return tuple(dict.fromkeys(self.layer.names.values()))

    def gradients(self, found: Sequence[Tensor | None], again: Again) -> dict[str, SampleGrads]:
        """By the layer's own rule, or by its forward run again."""
        present = [x for x in found if x is not None]
        if not present:
            return {}
        if self.layer.rule is None or self.layer.rule.whole:
            with again(), torch.autocast(*self.autocast, cache_enabled=False):
                local = _rerun(self.layer, self.inputs, found)
        else:
            with exact_products():
                local = _ruled(self.layer, self.inputs, present[0], self.shapes[0])
        named: dict[str, SampleGrads] = {}
        for name, grads in understood(self.layer, local, present[0].shape[0]).items():
            _put(named, self.layer.names[name], grads)
        return named


def _put(found: dict[str, SampleGrads], name: str, grads: SampleGrads) -> None:
    known = found.get(name)
    found[name] = grads if known is None else add(known, grads)


def _ruled(layer: Layer, inputs: Inputs, grad: Tensor, shape: torch.Size) -> dict[str, SampleGrads]:
    """The rule takes the rows of all examples' copies of the call for examples; then those of one are joined."""
    assert layer.rule is not None
    num_examples, num_rows = grad.shape[0], shape[0] if len(shape) > 1 else 1

    def spread(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if len(shape) < 2:
            return value.expand(num_examples, *value.shape)
        return value.expand(num_examples, *value.shape).flatten(0, 1)

    args, kwargs = pytree.tree_map(spread, (inputs.args, dict(inputs.kwargs)))
    grad = grad.flatten(0, 1) if len(shape) > 1 else grad
    found = layer.rule.function(layer.module, Inputs(args, kwargs), grad)
    if num_rows == 1 or not num_examples:
        return found
    rows = RowMap(num_examples, num_examples * num_rows, BLOCKS)
    return {name: joined(grads, rows) for name, grads in found.items()}


def _rerun(layer: Layer, inputs: Inputs, grads: Sequence[Tensor | None]) -> dict[str, SampleGrads]:
    """The gradients of a module without such a rule: its forward runs once more, and backwards for each example."""
    trainable = {name: p.detach() for name, p in layer.module.named_parameters() if name in layer.names}
    present = [i for i, g in enumerate(grads) if g is not None]

    def forward(parameters: dict[str, Tensor]) -> tuple[Tensor, ...]:
        outputs = functional_call(layer.module, parameters, inputs.args, dict(inputs.kwargs))
        floating = [x for x in pytree.tree_leaves(outputs) if is_floating(x)]
        return tuple(floating[i] for i in present)

    before = torch.random.get_rng_state()
    with torch.enable_grad():
        pull = vjp(forward, trainable)[1]
    if not torch.equal(before, torch.random.get_rng_state()):
        raise TypeError(
            f"expected module {layer.name or 'model'!r}, whose output serves all examples, to draw no random numbers; got "
            "dropout or the like, which would differ when it runs again; move it outside of the module"
        )
    (found,) = vmap(pull)(tuple(g for g in grads if g is not None))
    return {name: Dense(value) for name, value in found.items()}


def _backwards(value: Tensor, edges: Sequence[Any], grads: Tensor) -> list[Tensor | None]:
    """(B, ...) gradients of `edges`, for each row of `grads` (B, *value's shape)."""
    if grads.shape[0] == 0:
        return [None for _ in edges]
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        return list(torch.autograd.grad(value, edges, grads, is_grads_batched=True, **options))
    except RuntimeError:  # an operation that knows no vmap
        found = [torch.autograd.grad(value, edges, grad, **options) for grad in grads]
    return [None if some[0] is None else torch.stack(some) for some in zip(*found, strict=True)]  # pyright: ignore[reportArgumentType, reportCallIssue]


def chunks_of_rows(grad: Tensor, rows: RowMap) -> Iterator[Tensor]:
    """(b, N, ...) for b examples at a time: `grad` (N, ...) with the rows of all others set to zero."""
    owners = rows.owners(grad.device)
    step = max(1, CHUNK_ELEMENTS // max(1, grad.numel()))
    for start in range(0, rows.num_examples, step):
        examples = torch.arange(start, min(start + step, rows.num_examples), device=grad.device)
        mine = owners.unsqueeze(0) == examples.unsqueeze(1)
        yield torch.where(mine.view(*mine.shape, *(1,) * (grad.dim() - 1)), grad.unsqueeze(0), 0)


def gradients(
    value: Tensor, sources: Sequence[Source], parts: Sequence[Tensor], again: Again
) -> dict[str, SampleGrads]:
    """Gradients by canonical name of what `value` was made of; `parts` are its own, (b, ...) for b examples each."""
    edges = [edge for source in sources for edge in source.edges]
    pieces = [_backwards(value, edges, part.to(value.dtype)) for part in parts]
    joint = [_joint(some) for some in zip(*pieces, strict=True)]
    found: dict[str, SampleGrads] = {}
    for source in sources:
        mine, joint = joint[: len(source.edges)], joint[len(source.edges) :]
        for name, grads in source.gradients(mine, again).items():
            _put(found, name, grads)
    return found


def gradients_at(meeting: Meeting, grad: Tensor, rows: RowMap | None, again: Again) -> dict[str, SampleGrads]:
    """Gradients by canonical name of what a shared value was made of, from its gradient by rows where it met them.

    `rows` tells whose the rows are, None that each is an example.
    """
    sources = list(meeting.sources)
    if meeting.place.kind != "aligned":
        return gradients(meeting.value, sources, [grad if rows is None else rows.summed(grad)], again)
    rows = rows or RowMap(grad.shape[0], grad.shape[0], BLOCKS)
    return gradients(meeting.value, sources, list(chunks_of_rows(grad, rows)), again)


def _joint(pieces: Sequence[Tensor | None]) -> Tensor | None:
    present = [x for x in pieces if x is not None]
    return torch.cat(present) if present else None
