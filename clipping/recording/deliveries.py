# SPDX-License-Identifier: Apache-2.0
"""What taps deliver in a backward: through the layers' rules to per-example gradients, and on to the collector.

A parameter is handed on as soon as nothing that is left of the backward can add to it. A backward that raises drops its
record, and with it the collector.

Shapes: B examples.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from clipping.collectors.collector import Begin
from clipping.gradients.joined_rows import RowMap
from clipping.gradients.sample_grads import SampleGrads
from clipping.gradients.sum import add
from clipping.modules.layers import understood
from clipping.modules.replay import Origin, Turns
from clipping.modules.unruled_calls import Kept, Unruled, refuse_otherwise
from clipping.recording.call_checks import LOW, batch_first, only, refuse_rounded
from clipping.recording.row_attribution import Attribution, regrouped
from clipping.recording.tap import Call, Point
from clipping.reruns.nested_values import unflatten
from clipping.rounding.exact_products import exact_products
from clipping.rules.packed_sequences import padded_gradients
from clipping.rules.registry import Inputs
from clipping.shared_values.first_meetings import Meeting
from clipping.shared_values.shared_calls import SharedCall, gradients_at

TENSOR = object()
"""Stands for each tensor among the constants of a call."""


class Recording(Protocol):
    """The tape whose backwards these are."""

    is_paused: bool
    batch_dim: int


def exhausted(delivered: set[Point], calls: WeakSet[Point]) -> bool:
    """Whether each of the calls that are still alive has delivered."""
    return all(call in delivered for call in calls)


def idle(
    found: Mapping[str, SampleGrads], delivered: set[Point], calls: Mapping[str, WeakSet[Point]], name: str
) -> bool:
    """Whether nothing of `name` is still to be handed over before the end of the backward."""
    return name not in found and exhausted(delivered, calls[name])


class Record:
    """What one backward has delivered so far; it lives as long as that backward.

    `calls` are, for each parameter, the calls still alive: each delivers at most once in a backward, so that a
    parameter is whole when all of them have.
    """

    def __init__(
        self, begin: Begin, calls: Mapping[str, WeakSet[Point]], lock: AbstractContextManager[object]
    ) -> None:
        self.num_examples: int | None = None
        self._lock = lock
        self._calls = calls
        # The calls themselves: the id of one that is gone may be that of another.
        self._delivered: set[Point] = set()
        self._found: dict[str, SampleGrads] = {}
        self._checks: list[Callable[[], None]] = []
        # Not a bound method: a cycle would keep a failed backward's tensors until the collector of cycles runs.
        self._collector = begin(partial(idle, self._found, self._delivered, calls))
        self.unit = self._collector.unit
        """What the examples of this backward are clipped with; None where nothing of it is added."""

    def _exhausted(self, name: str) -> bool:
        return exhausted(self._delivered, self._calls[name])

    def take(self, point: Point, names: Iterable[str], grads: Mapping[str, SampleGrads]) -> None:
        """Keep what `point` delivered of `names`, by parameter name; hand over the parameters that are whole.

        To be called inside `exact_products`.
        """
        self._delivered.add(point)
        for name, found in grads.items():
            known = self._found.get(name)
            self._found[name] = found if known is None else add(known, found)
        whole = [name for name in dict.fromkeys(names) if name in self._found and self._exhausted(name)]
        if whole:
            self._hand_over(whole)

    def check(self, check: Callable[[], None], *, now: bool) -> None:
        """Run `check`, at the end of the backward unless `now`: it waits for the device."""
        if now:
            check()
        else:
            self._checks.append(check)

    def complete(self) -> None:
        """Hand over the rest."""
        for check in self._checks:
            check()
        with self._lock, exact_products():
            self._hand_over(list(self._found))
            self._collector.complete(self.num_examples or 0)

    def _hand_over(self, names: list[str]) -> None:
        for name in names:
            self._collector.ready(name, self._found.pop(name), self.num_examples or 0)


class Deliveries:
    """Takes what taps deliver, one record for each backward; `again` marks that a module runs again.

    `begin` makes the collector of each backward. `mean` says that backwards start from the mean of the losses. `valve` is
    open while the gradients of examples go back to what shared values are made of.
    """

    def __init__(
        self,
        tape: Recording,
        begin: Begin,
        calls: Mapping[str, WeakSet[Point]],
        attribution: Attribution,
        turns: Turns,
        unruled: Unruled,
        again: Callable[[], AbstractContextManager[None]],
        *,
        mean: bool,
    ) -> None:
        self.tape = tape
        self.calls = calls
        self.attribution = attribution
        self.turns = turns
        self.valve = [False]
        self._begin = begin
        self._unruled = unruled
        self._again = again
        self._mean = mean
        self._records: WeakValueDictionary[int, Record] = WeakValueDictionary()
        # Devices have a thread each in a backward; two of them must not begin a record each.
        self._lock = threading.RLock()

    def deliver(self, call: Call, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> None:
        """Take the inputs and the output gradients of a call."""
        if self.attribution.asking:
            return self.attribution.see((call,), grads)
        with self._lock:
            self._take(call, saved, grads)

    def arrive(self, meetings: Sequence[Meeting], grad: Tensor, own: Callable[[], Sequence[Tensor]]) -> None:
        """Take the gradients, by rows, of values that serve all examples."""
        if self.attribution.asking:
            return self.attribution.see(meetings, (grad,))
        with self._lock:
            record = self._record(meetings[0].origin, meetings[0].names[0])
            refuse_rounded(meetings[0].names[0], (grad,), mean=self._mean)
            for meeting, mine in zip(meetings, own(), strict=True):
                rows = self.attribution.rows(record, meeting, meeting.place.rows)
                self.valve[0] = True
                try:
                    found = gradients_at(meeting, mine, rows, self._again) if record.num_examples else {}
                finally:
                    self.valve[0] = False
                with exact_products():
                    record.take(meeting, meeting.names, found)

    def _record(self, origin: Origin, name: str) -> Record:
        """That of the running backward."""
        if self.tape.is_paused:
            raise RuntimeError(
                f"expected nothing to record while paused; got a backward through {name!r}, which ran "
                "before the pause; run the model inside the same block as the backward"
            )
        task = torch._C._current_graph_task_id()
        record = self._records.get(task)
        if record is None:
            # Only the callback holds the record: a backward that raises drops both.
            record = self._records[task] = Record(self._begin, self.calls, self._lock)
            torch.autograd.Variable._execution_engine.queue_callback(record.complete)
        # The layers of one forward come one after another.
        if self.turns.delivering != (origin, record.unit):
            self.turns.require(origin, record.unit)
        return record

    def _take(self, call: Call, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> None:
        if call.in_backward:
            raise RuntimeError(
                f"expected layer {call.layer.name!r} to run before the backward; got reentrant gradient "
                "checkpointing, which hides layers from the record; use use_reentrant=False (in transformers: "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}))'
            )
        record = self._record(call.origin, call.layer.name)
        if any(grad is not None and grad.dtype in LOW for grad in grads):
            refuse_rounded(call.layer.name, grads, mean=self._mean)
        supply = iter(saved)
        leaves = [next(supply) if x is TENSOR else x for x in call.constants]
        names = call.layer.names
        if call.kept is not None:
            local = self._apply_generic(record, call, call.kept, leaves, grads)
            with exact_products():
                record.take(call, names.values(), {names[name]: value for name, value in local.items()})
            return
        args, kwargs = (tuple(leaves), {}) if call.structure is None else unflatten(leaves, call.structure)  # pyright: ignore[reportGeneralTypeIssues]
        inputs = Inputs(args, kwargs)
        # A layer that runs again must do so as it ran; a rule's products are exact.
        again = call.spread is not None or call.dims is not None
        found = self._found_again(record, call, inputs, grads) if again else {}
        with exact_products():
            if not again:
                local = self._apply_rule(record, call, inputs, grads)
                found = {names[name]: value for name, value in local.items()}
            record.take(call, names.values(), found)

    def _found_again(
        self, record: Record, call: Call, inputs: Inputs, grads: tuple[Tensor | None, ...]
    ) -> dict[str, SampleGrads]:
        """By parameter name, where the layer runs again for it."""
        if call.spread is not None:
            return self._apply_spread(record, call, inputs, only(call.layer, grads))
        names = call.layer.names
        return {names[n]: value for n, value in self._apply_rule(record, call, inputs, grads).items()}

    def _apply_spread(
        self, record: Record, call: Call, inputs: Inputs, grad: Tensor
    ) -> dict[str, SampleGrads]:
        assert call.spread is not None
        rows = self.attribution.rows(record, call, grad.shape[0])
        if not record.num_examples:
            return {}
        grad = grad if rows is None else rows.summed(grad)
        shared = SharedCall(call.layer, inputs, (), (call.spread,), call.autocast)
        return shared.gradients([grad.reshape(grad.shape[0], *call.spread)], self._again)

    def _apply_rule(
        self, record: Record, call: Call, inputs: Inputs, grads: tuple[Tensor | None, ...]
    ) -> dict[str, SampleGrads]:
        layer, dims = call.layer, call.dims
        if call.fold is not None:
            inputs, grads = call.fold.unfolded(inputs, grads)
        if call.structure is not None:
            grads = padded_gradients(inputs, grads)
        if dims is None:
            grad = grads[0] if len(grads) == 1 and grads[0] is not None else only(layer, grads)
            if self.tape.batch_dim:
                inputs, grad = batch_first(inputs, grad, self.tape.batch_dim)
            assert layer.rule is not None
            rows = self.attribution.rows(record, call, grad.shape[0], grad.shape)
            # An empty batch has no gradients, and rules could not tell its other dimensions.
            if not grad.shape[0]:
                return {}
            if rows is not None and rows.depth > 1:
                grad = grad.flatten(0, 1)
                inputs = Inputs(*pytree.tree_map(rows.flat, (inputs.args, dict(inputs.kwargs))))
            num_rows = grad.shape[0]
            found = layer.rule.function(layer.module, inputs, grad)
            found = understood(layer, found, num_rows)
            return found if rows is None else regrouped(found, rows)
        num_rows, rows = self._rows(record, call, grads, dims.outputs)
        if not num_rows:
            return {}
        with self._again(), torch.autocast(*call.autocast, cache_enabled=False):
            assert layer.rule is not None
            found = layer.rule.function(layer.module, inputs, grads)
            return regrouped(understood(layer, found, num_rows), rows)

    def _apply_generic(
        self, record: Record, call: Call, kept: Kept, leaves: list[object], grads: tuple[Tensor | None, ...]
    ) -> dict[str, SampleGrads]:
        rows = self.attribution.rows(record, call, kept.num_examples)
        if not kept.num_examples:
            return {}
        with self._again(), torch.autocast(*call.autocast, cache_enabled=False):
            found, same = self._unruled.gradients(call.layer, kept, leaves, grads)
        record.check(
            partial(refuse_otherwise, call.layer, same), now=same is None or same.device.type == "cpu"
        )
        return regrouped(found, rows)

    def _rows(
        self, record: Record, call: Call, grads: Sequence[Tensor | None], dims: Sequence[int | None]
    ) -> tuple[int, RowMap | None]:
        """The rows of the output gradients, 0 for an empty batch, and whose they are."""
        found: tuple[int, RowMap | None] = 0, None
        for grad, dim in zip(grads, dims, strict=True):
            if grad is not None:
                num_rows = grad.shape[dim] if dim is not None and grad.dim() > dim else 0
                found = num_rows, self.attribution.rows(record, call, num_rows)
        return found
