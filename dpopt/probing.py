# SPDX-License-Identifier: Apache-2.0
"""The numerical probe of a run: now and then, one example's output must not reach another's.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from clipping import Apart, Collector, MixesExamples, Tape

DUE = frozenset((1, 2, 10, 100, 1000, 10_000))
"""The batches of a run on which the probe is due."""


class Probing:
    """Sends back one example's row through the graph of a batch, and looks at every other example.

    It runs on the first batch and again on those that `DUE` lists, since a branch that starts at zero mixes only
    once it has been trained; where the chosen examples send nothing back, it tries again on the next batch.
    `part` tells the size of the part handed out last, or None outside a step. Keeps no gradient.
    """

    def __init__(self, tape: Tape, part: Callable[[], int | None]) -> None:
        self.done = False
        self.num_batches = 0
        self.chosen: int | None = None
        self.watched: list[Tensor] = []
        self._tape = tape
        self._part = part
        self._home = id(tape.model)
        self._apart: Apart | None = None

    def run(self, rows: list[Tensor]) -> None:
        """Refuse a model or loss where one example's row of `rows`, (B, ...) each, reaches another example.

        The graph stays usable. First, last and middle are tried: a running statistic reaches in one direction
        only, and a loss may leave out some examples. Two that say something are enough.
        """
        num_examples, witnesses = rows[0].shape[0], 0
        try:
            for self.chosen in dict.fromkeys((0, num_examples - 1, num_examples // 2)):
                if witnesses < 2:
                    torch.stack([x[self.chosen].sum().real for x in rows]).sum().backward(retain_graph=True)
                    witnesses += self._apart is not None and self._apart.witnessed
            self.done = witnesses == min(2, num_examples)
        finally:
            self.chosen = self._apart = None
            self.watched = []

    def begin(self) -> None:
        """A batch was drawn."""
        self.num_batches += 1
        if self.num_batches in DUE:
            self.done = False
            self._tape.doubt()

    def collector(self) -> Collector:
        """That of a backward of the probe."""
        assert self.chosen is not None
        self._apart = Apart(self.chosen, "output or loss", self._refuse_inputs)
        return self._apart

    def watch_inputs(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook of the model: let the probe see which floating-point inputs an output depends on.

        Layers tell of mixing behind them only; a model that centres its inputs by the batch mixes before them.
        """
        if not self._wanted(model):
            return None
        self.watched = []
        return pytree.tree_map(self._watch, (args, kwargs))

    def probe_outputs(self, model: nn.Module, _: Any, outputs: object) -> None:
        """Forward hook of the model: probe its outputs for a part, where a dimension is clearly the batch."""
        part = self._part()
        if not self._here(model) or part is None or part < 2:
            return
        leaves = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
        rows = [x for leaf in leaves if (x := self._batch_first(leaf, part)) is not None]
        if rows:
            self._tape.attribute(rows, part)
            if not self.done:
                self.run(rows)

    def _watch(self, value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        self.watched.append(leaf)
        return leaf.clone()  # no leaf: the model may change it in place

    def _wanted(self, model: nn.Module) -> bool:
        return not self.done and self._here(model)

    def _here(self, model: nn.Module) -> bool:
        # A deep copy of the model brings copies of its hooks along: they know that they are not at home.
        ready = self._part() is not None and id(model) == self._home and not self._tape.is_paused
        return ready and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _batch_first(self, values: Tensor, num_examples: int) -> Tensor | None:
        dims = {d for d in (0, self._tape.batch_dim) if values.dim() > d and values.shape[d] == num_examples}
        return values.movedim(dims.pop(), 0) if len(dims) == 1 else None

    def _refuse_inputs(self, num_examples: int) -> None:
        chosen = (self.chosen or 0) % max(1, num_examples)
        others = [i for i in range(num_examples) if i != chosen]
        for leaf in self.watched:
            rows = None if leaf.grad is None else self._batch_first(leaf.grad, num_examples)
            leaf.grad = None
            if rows is not None and bool((rows[others].abs() > 0).any()):
                raise MixesExamples(
                    "expected the output or loss of one example to depend on that example alone; got one that "
                    "depends on another example's input; look for inputs centred or scaled by the batch"
                )
