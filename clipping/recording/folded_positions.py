# SPDX-License-Identifier: Apache-2.0
"""Layers inside a block that folds positions into the batch: row n of B * T belongs to example n // T.

Only blocks declared with `folds` are known to keep the rows in their order; how many examples there are is read
from the block's own input, never guessed from the number of rows.

Shapes: B examples, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from clipping.modules.layers import Layer
from clipping.rules.registry import Inputs


class Fold(NamedTuple):
    """The shape (B, T) that one call of a block folded into rows."""

    num_examples: int
    num_positions: int

    @property
    def rows(self) -> int:
        """B * T."""
        return self.num_examples * self.num_positions

    def unfolded(
        self, inputs: Inputs, grads: Sequence[Tensor | None]
    ) -> tuple[Inputs, tuple[Tensor | None, ...]]:
        """Inputs and output gradients with rows (B, T, ...)."""
        args, kwargs = pytree.tree_map(self._unfold, (inputs.args, dict(inputs.kwargs)))
        return Inputs(args, kwargs), tuple(None if g is None else self._unfold(g) for g in grads)

    def _unfold(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != self.rows:
            return value
        return value.unflatten(0, (self.num_examples, self.num_positions))


class Folds:
    """What the folding blocks of a model were last called with."""

    def __init__(self, layers: Sequence[Layer], batch_dim: int) -> None:
        self.blocks = tuple(
            {id(layer.fold): layer.fold for layer in layers if layer.fold is not None}.values()
        )
        self.batch_dim = batch_dim
        self._seen: dict[int, Fold] = {}

    def note(self, block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Forward pre-hook of each block."""
        first = Inputs(args, kwargs).first
        if first.dim() != 3 or self.batch_dim != 0:
            raise ValueError(
                f"expected an input (B, T, D) at {type(block).__name__}, which folds positions into the batch; got "
                f"{tuple(first.shape)} with the batch in dimension {self.batch_dim}; call it with the batch first"
            )
        self._seen[id(block)] = Fold(first.shape[0], first.shape[1])

    def of(self, layer: Layer, outputs: Sequence[Tensor]) -> Fold | None:
        """The fold of one call of `layer`, None outside such blocks; raises where rows are not all positions."""
        if layer.fold is None:
            return None
        fold = self._seen.get(id(layer.fold))
        if fold is None or layer.rule is None or any(x.dim() < 2 or x.shape[0] != fold.rows for x in outputs):
            shapes = [tuple(x.shape) for x in outputs]
            raise ValueError(
                f"expected layer {layer.name!r} in {type(layer.fold).__name__} to have a rule and to see every "
                f"position of every example; got {type(layer.module).__name__} with outputs {shapes}; give it a rule "
                "with @clipping.rule, and route by zero weights instead of selecting rows"
            )
        return fold
