# SPDX-License-Identifier: Apache-2.0
"""The numerical probe of a run: now and then, one example's output must not reach another's.

Shapes: B examples.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from clipping.collectors.collector import Collector
from clipping.errors import MixesExamples
from clipping.recording.tape import Tape
from clipping.validators.examine import Apart, Together
from clipping.validators.own_functions import Constants, other_examples, own_functions

DUE = frozenset((1, 2, 10, 100, 1000, 10_000))
"""The batches of a run on which the probe is due."""


class Watched(NamedTuple):
    """An input of the model: a leaf, and its (index, length) in each sequence around it."""

    leaf: Tensor
    places: tuple[tuple[int, int], ...]


class Probing:
    """Sends back one example's row through the graph of a batch, and looks at every other example.

    It runs on the first batch and again on those that `DUE` lists, since a branch that starts at zero mixes only
    once it has been trained; where the chosen examples send nothing back, it tries again on the next batch.
    `part` tells the size of the part handed out last, or None outside a step; `rehearsed` whether the inputs of the
    running forward were seen to stay apart (`clipping.validators.runtime_rehearsal`), which need no watching then. Keeps no gradient.
    """

    def __init__(
        self, tape: Tape, part: Callable[[], int | None], rehearsed: Callable[[], bool] = lambda: False
    ) -> None:
        self.done = self.losses_done = False
        self.num_batches = 0
        self.chosen: int | None = None
        self.watched: list[Watched] = []
        self._tape = tape
        self._part = part
        self._rehearsed = rehearsed
        self._home = id(tape.model)
        self._apart: Apart | None = None
        self._norms: dict[int, dict[str, Tensor]] = {}
        self._together: Together | None = None
        self._constants = Constants()
        self._asking: bool | None = None

    def run(self, rows: list[Tensor], *, losses: bool = False) -> None:
        """Refuse a model or loss where one example's row of `rows`, (B, ...) each, reaches another example.

        The graph stays usable. First, last and middle are tried: a running statistic reaches in one direction
        only, and a loss may leave out some examples. Two that say something are enough. Then all are sent back together:
        the gradients of the chosen ones must be what they were alone. `losses` says that `rows` are the losses (B,).
        """
        num_examples, witnesses = rows[0].shape[0], 0
        try:
            for self.chosen in dict.fromkeys((0, num_examples - 1, num_examples // 2)):
                if witnesses < 2:
                    self._send(torch.stack([x[self.chosen].sum().real for x in rows]).sum())
                    if self._apart is not None and self._apart.witnessed:
                        witnesses += 1
                        self._norms[self.chosen] = self._apart.norms
            if self._norms and num_examples > 1:
                self._run_together(rows, losses)
            self.done = witnesses == min(2, num_examples)
            self.losses_done = self.losses_done or (losses and self.done)
        finally:
            self.chosen = self._apart = self._together = None
            self._norms = {}
            self.watched = []

    def _send(self, total: Tensor) -> None:
        # No further: what lies outside the model would find the probe in its `.grad`.
        total.backward(retain_graph=True, inputs=[self._tape.anchor, *(x.leaf for x in self.watched)])

    def _run_together(self, rows: list[Tensor], losses: bool) -> None:
        num_examples, total = rows[0].shape[0], torch.stack([x.sum().real for x in rows]).sum()
        self._together = Together(self._norms)
        self._send(total)
        functions = own_functions(rows[0]) if losses else []
        if functions:
            self._constants.require(functions, num_examples)
            chosen, norms = next(iter(self._norms.items()))
            self._together = Together({chosen: norms})
            with _disable_current_modes(), other_examples(functions, chosen, num_examples):
                self._send(total)
        for x in self.watched:
            x.leaf.grad = None

    def __deepcopy__(self, memo: dict[int, object]) -> Probing:
        """Itself: a copied model is an ordinary model, whose copied hooks know that they are not at home."""
        return self

    def begin(self) -> None:
        """A batch was drawn."""
        self.num_batches += 1
        if self.num_batches in DUE:
            self.renew()

    def renew(self) -> None:
        """Look again."""
        self.done = self.losses_done = False
        self._tape.doubt()

    def collector(self) -> Collector:
        """That of a backward of the probe."""
        assert self.chosen is not None
        if self._together is not None:
            return self._together
        self._apart = Apart(self.chosen, "output or loss", self._refuse_inputs)
        return self._apart

    def watch_inputs(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook of the model: let the probe see which floating-point inputs an output depends on.

        Layers tell of mixing behind them only; a model that centres its inputs by the batch mixes before them.
        """
        if not self._wanted(model) or self._asks_for_gradients(model):
            return None
        self.watched = []
        if self._rehearsed():
            return None
        return pytree.tree_map_with_path(partial(self._watch, (args, kwargs)), (args, kwargs))

    def _asks_for_gradients(self, model: nn.Module) -> bool:
        # Such a model cannot be handed inputs that carry gradients already: torch refuses to set what is set.
        if self._asking is None:
            self._asking = any(asks_for_gradients(kind) for kind in {type(m) for m in model.modules()})
        return self._asking

    def probe_outputs(self, model: nn.Module, _: Any, outputs: object) -> None:
        """Forward hook of the model: probe its outputs for a part, where a dimension is clearly the batch."""
        part = self._part()
        if not self._here(model) or part is None or part < 2:
            return

        def is_each(
            value: object,
        ) -> bool:  # a list of one thing for each example, whose tensors are of one example
            return isinstance(value, list) and len(value) == part

        found = pytree.tree_leaves(outputs, is_leaf=is_each)
        leaves = [x for x in found if isinstance(x, Tensor) and x.requires_grad]
        rows = [x for leaf in leaves if (x := self._batch_first(leaf, part)) is not None]
        if rows:
            self._tape.attribute(rows, part)
            if not self.done:
                self.run(rows)

    def _watch(self, inputs: object, path: pytree.KeyPath, value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
            return value
        if isinstance(pytree.key_get(inputs, path[:-1]), PackedSequence):  # its rows are positions
            return value
        leaf = value.detach().requires_grad_()
        self.watched.append(Watched(leaf, _places(inputs, path)))
        return leaf.clone()  # no leaf: the model may change it in place

    def _wanted(self, model: nn.Module) -> bool:
        return not self.done and self._here(model)

    def _here(self, model: nn.Module) -> bool:
        # A deep copy of the model brings copies of its hooks along: they know that they are not at home.
        ready = self._part() is not None and id(model) == self._home
        ready = ready and not self._tape.is_paused and not self._tape.is_rerunning
        return ready and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _batch_first(self, values: Tensor, num_examples: int) -> Tensor | None:
        dims = {d for d in (0, self._tape.batch_dim) if values.dim() > d and values.shape[d] == num_examples}
        return values.movedim(dims.pop(), 0) if len(dims) == 1 else None

    def _refuse_inputs(self, num_examples: int) -> None:
        chosen = (self.chosen or 0) % max(1, num_examples)
        others = [i for i in range(num_examples) if i != chosen]
        for leaf, places in self.watched:
            grad, leaf.grad = leaf.grad, None
            if grad is None:
                continue
            rows = self._batch_first(grad, num_examples)
            # A sequence as long as the batch is wide may be of one example: no reading may be an innocent one.
            readings = [] if rows is None else [rows[others], *_in_other_dims(grad, others, num_examples)]
            readings += [grad if i != chosen else grad[:0] for i, size in places if size == num_examples]
            if readings and all(bool((x.abs() > 0).any()) for x in readings):
                raise MixesExamples(
                    "expected the output or loss of one example to depend on that example alone; got one that "
                    "depends on another example's input; look for inputs centred or scaled by the batch"
                )


def asks_for_gradients(kind: type[nn.Module]) -> bool:
    """Whether the forward of a kind of module sets `requires_grad` on something, as models of raw sound do on their input."""
    try:
        text = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    return re.search(r"\.requires_grad(_\(\s*(True)?\s*\)|\s*=\s*True)", text) is not None


def _in_other_dims(grad: Tensor, others: list[int], num_examples: int) -> list[Tensor]:
    """What the others would have, were the examples in the second or third dimension, (T, B, D), that is as long."""
    dims = [dim for dim in (1, 2) if grad.dim() > dim and grad.shape[dim] == num_examples]
    return [grad.movedim(dim, 0)[others] for dim in dims]


def _places(inputs: object, path: pytree.KeyPath) -> tuple[tuple[int, int], ...]:
    """(index, length) of each sequence within an argument that leads to the leaf at `path` of (args, kwargs)."""
    steps = [(i, key) for i, key in enumerate(path) if i > 1 and isinstance(key, pytree.SequenceKey)]
    return tuple((key.idx, len(pytree.key_get(inputs, path[:i]))) for i, key in steps)
