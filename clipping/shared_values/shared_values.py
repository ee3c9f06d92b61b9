# SPDX-License-Identifier: Apache-2.0
"""Values of a forward that serve all examples: which they are, and what becomes of their gradients.

The first forward is followed operation by operation (`clipping.shared_values.example_free`). Where each such value meets the examples at
once, in one broadcast operation as positions do, later forwards do the same at the layer's output and nothing is
followed. Else every forward is, at a microsecond or two for each operation.

Shapes: B examples, R rows that the model is called with.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipping.modules.layers import Layer
from clipping.modules.replay import Origin
from clipping.rules.registry import Inputs
from clipping.shared_values.example_free import tensors_of
from clipping.shared_values.followed_forward import FOLLOWED, ROWS, Forward, Home, Key, Spread, Use, leaf_of

_DYNAMO = os.path.join("_dynamo", "eval_frame.py")


class Shares:
    """What is known of the shared values of a model from the forwards that were followed."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._plan: dict[Key, Use] = {}
        self._made: dict[tuple[str, torch.Size], Use] = {}
        self._seen: set[Key] = set()
        self._blind = False
        self._rows = 0
        self._inside = False
        self._always = False
        self._settled: set[str] = set()
        self._entry = ""
        self._numbers: Counter[str] = Counter()
        self.forward: Forward | None = None

    def doubt(self) -> None:
        """Follow the next forward."""
        self._settled.clear()

    def begin(self, entry: str, rows: int, given: Sequence[Tensor], origin: Origin) -> None:
        """A forward of the model, or of its part `entry`, begins on so many rows of the tensors that it is `given`."""
        self.unwind()
        self._entry = entry
        self._numbers.clear()
        self._made.clear()
        self._rows = rows
        self._inside = True
        wanted = self._always or entry not in self._settled
        self._blind = wanted and in_compiled_code()
        if wanted and not self._blind:
            forward = Forward(rows, self._home, origin)
            for value in given:
                forward.values.note(value, known=False)
            forward.values.__enter__()
            self.forward = forward

    def end(self) -> None:
        """It has ended: learn from it, where more than one row told rows from what serves them all."""
        forward = self.forward
        self.unwind()
        if forward is None or forward.rows < 2:
            return
        self._settled.add(self._entry)
        for key, uses in forward.uses.items():
            use = _settled(uses)
            self._plan[key] = use
            self._always = self._always or use == FOLLOWED
        self._always = self._always or forward.stands_in

    def unwind(self) -> None:
        """Leave the mode of a forward that was interrupted."""
        self._inside = False
        if self.forward is not None:
            self.forward.values.__exit__(None, None, None)
            self.forward.finish()
            self.forward = None

    @contextmanager
    def unfollowed(self) -> Iterator[None]:
        """A block that is no part of the forward."""
        values = None if self.forward is None else self.forward.values
        if values is not None:
            values.aside = True
        try:
            yield
        finally:
            if values is not None:
                values.aside = False

    def detached(self, layer: Layer) -> None:
        """The layer runs on parameters that no example entered."""
        if self.forward is not None:
            for member in layer.members:
                held = (*member._parameters.values(), *tensors_of((vars(member).get("_flat_weights"),)))
                for value in held:
                    if value is not None and not isinstance(value, nn.Parameter):
                        self.forward.values.note(value, known=True)

    def handed_out(
        self, layer: Layer, inputs: Inputs, outputs: list[Tensor], autocast: Sequence[Any], in_backward: bool
    ) -> list[Tensor] | Tensor | None:
        """What a call hands out that serves all examples: values that are followed, or one to tap; None for others."""
        use: Use | None = None
        if in_backward:
            use = self._made.get((layer.name, outputs[0].shape))
            if use == FOLLOWED:  # as in the forward that is run again here
                return [x if x.requires_grad else leaf_of(x, layer.name).clone() for x in outputs]
        elif self._blind:
            use = _told_by_indices(layer, inputs)
        elif not self._inside:
            refuse_flat_indices(layer, inputs)
        else:
            self._numbers[layer.name] += 1
            key = Key(layer.name, self._numbers[layer.name], outputs[0].dim())
            if self.forward is not None:
                self._seen.add(key)
                if not self.forward.serves_all(outputs):
                    return None
                self._made[layer.name, outputs[0].shape] = FOLLOWED
                return self.forward.call(layer, key, inputs, outputs, autocast)
            use = self._plan.get(key)
            if key not in self._seen:  # another way through the model than those that were followed
                self._settled.discard(self._entry)
                refuse_flat_indices(layer, inputs)
        if not isinstance(use, Spread) or len(outputs) > 1 or (use.lead == 0 and outputs[0].shape[0] != 1):
            return None
        self._made[layer.name, outputs[0].shape] = use
        value = outputs[0].reshape(*(1,) * use.lead, *outputs[0].shape)
        return value.expand(self._rows, *value.shape[1:])


def _settled(uses: set[Use]) -> Use:
    if uses <= {ROWS, "shape"}:
        return ROWS
    (use, *rest) = uses
    return use if not rest and isinstance(use, Spread) else FOLLOWED


def in_compiled_code() -> bool:
    """Whether compiled code runs around this, whose operations no mode sees."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_DYNAMO) and frame.f_code.co_name in ("compile_wrapper", "_fn"):
            context = frame.f_locals.get("self")
            if context is not None and type(context).__name__ in ("OptimizeContext", "RunOnlyContext"):
                return True
        frame = frame.f_back
    return False


def _told_by_indices(layer: Layer, inputs: Inputs) -> Use | None:
    """Indices (1, ...) of an embedding stand for all examples, where nothing else can be told."""
    refuse_flat_indices(layer, inputs)
    stands = isinstance(layer.module, nn.Embedding) and inputs.first.dim() > 1 and inputs.first.shape[0] == 1
    return Spread(0) if stands and layer.rule is not None else None


def refuse_flat_indices(layer: Layer, inputs: Inputs) -> None:
    """Raise ValueError where an embedding sees indices of one dimension, and nothing tells what made them."""
    if isinstance(layer.module, nn.Embedding) and inputs.first.dim() == 1:
        raise ValueError(
            f"expected indices with the batch in dimension 0 for embedding {layer.name!r}, called outside of the model's own "
            f"forward; got shape {tuple(inputs.first.shape)}, in which positions would look like examples; call the model "
            "itself, or give positions the shape (B, T)"
        )
