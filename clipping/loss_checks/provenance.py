# SPDX-License-Identifier: Apache-2.0
"""Follows the batch through the loop, operation by operation: what was made from which examples.

The graph of a loss shows what gradients flow through. It does not show how a weight, a label or an input was made:
`w / w.mean()`, `y[permutation]` and `x - x.mean(0)` are constants to it.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from clipping.loss_checks.batch import handed_out, tensors
from clipping.loss_checks.operations.arithmetic import elementwise
from clipping.loss_checks.operations.registry import rule_of
from clipping.loss_checks.operations.state import (
    ONE,
    Alone,
    Facts,
    Operation,
    Rows,
    State,
    Total,
    Unproven,
    ruled,
)
from clipping.loss_checks.operations.unknown import Call, tried

_Place = tuple[int, tuple[int, ...], tuple[int, ...]]


def _place(value: Tensor) -> _Place:
    return int(value.storage_offset()), tuple(value.shape), tuple(value.stride())


def _joined(views: Iterable[State]) -> Unproven | None:
    """What a memory is that holds parts of these kinds: mixed, or nothing that is known."""
    orders = set()
    for state in views:
        if isinstance(state, Unproven):
            return state
        if isinstance(state, Rows):
            orders.add(state.layout.order)
    mixed = "rows of different examples written into one tensor"
    return Unproven(mixed, shown=True) if len(orders) > 1 else None


_EARLIER = Unproven("a tensor that was made from an earlier batch", shown=True)


class Seen:
    """What is known of tensors, as long as their memory lives: views of one storage are told apart by their shape."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[ref[torch.UntypedStorage], dict[_Place, State]]] = {}
        self._batch: set[int] = set()
        self._earlier: dict[int, ref[torch.UntypedStorage]] = {}

    def of(self, value: Tensor) -> State:
        """The state of `value`."""
        storage = _storage(value)
        if storage is None:
            return None
        found = self._views(storage)
        place = _place(value)
        if place in found:
            return found[place]
        earlier = self._earlier.get(storage._cdata)
        return _EARLIER if earlier is not None and earlier() is storage else _joined(found.values())

    def hand_out(self, value: Tensor, state: State) -> None:
        """Note the state of a tensor of the batch, which may be a view of the whole dataset."""
        storage = _storage(value)
        if storage is not None:
            self._views(storage)[_place(value)] = state
            self._batch.add(storage._cdata)
            self._earlier.pop(storage._cdata, None)  # the dataset's own memory, handed out again

    def is_earlier(self, value: Tensor) -> bool:
        """Whether `value` lies in memory of an earlier batch."""
        storage = _storage(value) if self._earlier else None
        known = None if storage is None else self._earlier.get(storage._cdata)
        return known is not None and known() is storage

    def put(self, value: Tensor, state: State, *, written: bool = False) -> None:
        """Note the state of `value`; where its memory was `written` to and is mixed now, so are its other views."""
        storage = _storage(value)
        if storage is None:
            return
        found = self._views(storage)
        found[_place(value)] = state
        if not written:
            return
        if value.numel() * value.element_size() == storage.nbytes():
            self._earlier.pop(storage._cdata, None)
        mixed = _joined(found.values())
        if mixed is not None:
            found.clear()
            found[_place(value)] = mixed

    def _views(self, storage: torch.UntypedStorage) -> dict[_Place, State]:
        known = self._known.get(storage._cdata)
        if known is None or known[0]() is not storage:  # its address was given to another
            known = self._known[storage._cdata] = ref(storage), {}
        return known[1]

    def end(self) -> None:
        """The batch is over: what was made from it and lives on is of an earlier one from here on."""
        made = {
            key: known
            for key, (known, found) in self._known.items()
            if key in self._batch or any(state is not None for state in found.values())
        }
        self._earlier = {key: known for key, known in (self._earlier | made).items() if known() is not None}
        self._known.clear()
        self._batch.clear()


def _below(roots: Sequence[Any]) -> list[Tensor]:
    """The leaves that a backward of `roots` reaches, but for those of parameters."""
    stack: list[Any] = [x.grad_fn for x in roots if isinstance(x, Tensor)]
    seen: set[Any] = set()
    found: list[Tensor] = []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and not isinstance(variable, nn.Parameter):
            found.append(variable)
        stack += [below for below, _ in node.next_functions]
    return found


def _leaves(values: Sequence[Any]) -> list[tuple[Any, Tensor | None]]:
    return [(x, x.grad if isinstance(x, Tensor) else None) for x in values]


def _storage(value: Tensor) -> torch.UntypedStorage | None:
    if value.layout != torch.strided or value.is_nested:
        return None
    try:
        return value.untyped_storage()
    except (NotImplementedError, RuntimeError):  # inside torch.func
        return None


class Provenance(TorchDispatchMode):
    """Notes for each tensor that the loop makes how it depends on the examples of the batch handed out.

    Nothing is refused here. Operations inside the private model and inside a backward are passed on as they are.
    """

    # torch.compile leaves a mode alone that says so; under others it gives up on a function for good.
    @classmethod
    def is_infra_mode(cls) -> bool:
        """Whether torch.compile may go on."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """The same."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self.facts = Facts(tracing=True)
        self.read: set[float] = set()
        """Numbers that the loop read from the batch."""
        self.counted: set[int] = set()
        """Whole numbers among them, and sizes of selections."""
        self.listed = False
        """Whether the batch may be a list of examples, or has as many parts as examples."""
        self._inside = 0
        self.on = False
        """Whether a batch is being followed."""
        self.entered = False
        """Whether torch hands operations over: a little longer, where the loop is in a mode of its own."""

    def made(self, value: Tensor, num_examples: int) -> State:
        """How `value` was made; where it is known for another batch than of `num_examples`, only that it is mixed."""
        found = self.seen.of(value)
        same = num_examples == self.facts.num_examples
        return found if same or isinstance(found, Unproven) else None

    def start(self, batch: object, num_examples: int, batch_dim: int) -> None:
        """Follow a batch from here on."""
        self.stop()
        self.seen.end()
        self.facts = Facts(tracing=True, num_examples=num_examples)
        for tensor in tensors(batch):
            self.seen.hand_out(tensor, None)
        for tensor, state in handed_out(batch, num_examples, batch_dim):
            self.seen.hand_out(tensor, state)
        self.listed = isinstance(batch, list | tuple) and len(batch) == num_examples
        self.on, self._inside = True, 0
        if not self.entered:
            self.__enter__()
            self.entered = True

    def pass_by(self, batch: object) -> None:
        """A batch is handed out that is not followed: know it again when it comes later."""
        self.seen.end()
        for tensor in tensors(batch):
            self.seen.hand_out(tensor, None)

    def stop(self) -> None:
        """Follow nothing; a mode that the loop entered since and did not leave keeps this one below it, idle."""
        if self.on:
            self.on = False
            self.seen.end()
            self.read.clear()
            self.counted.clear()
        if self.entered and any(mode is self for mode in _get_current_dispatch_mode_stack()[-1:]):
            self.__exit__(None, None, None)
            self.entered = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A block that is not followed."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def note_gradients(
        self, roots: Sequence[Any], inputs: Sequence[Any], grads: Sequence[Tensor | None]
    ) -> None:
        """Gradients were made, of `inputs` or, without any, of all leaves below `roots`.

        Those of a sum over the examples are rows as their tensors are; those of what mixes them are mixed.
        """
        states = [self.seen.of(root) for root in roots if isinstance(root, Tensor)]
        mixed = next((state for state in states if isinstance(state, Unproven) and state.shown), None)
        apart = bool(states) and all(isinstance(state, Total | Rows | Alone) for state in states)
        pairs = list(zip(inputs, grads, strict=False)) if grads else _leaves(inputs or _below(roots))
        for value, grad in pairs:
            known = self.seen.of(value) if isinstance(value, Tensor) else None
            if grad is None or known is None or not (apart or mixed):
                continue
            self.seen.put(grad, mixed or (known._replace(factor=ONE) if isinstance(known, Rows) else known))

    def enter_model(self) -> None:
        """The private model begins to run."""
        self._inside += 1

    def leave_model(self) -> None:
        """It has run."""
        self._inside = max(0, self._inside - 1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, and note what becomes of it."""
        outputs = func(*args, **(kwargs or {}))
        if self.on and not self._inside and torch._C._current_graph_task_id() == -1:
            with self.inside():
                self._note(func, args, dict(kwargs or {}), outputs)
        return outputs

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        call = Call.of(func, args, kwargs)
        states = tuple(self.seen.of(x) for x in call.inputs)
        name = func._schema.name.partition("::")[2]
        if torch.Tag.dynamic_output_shape in func.tags and any(state is not None for state in states):
            self.counted.update(x.shape[0] for x in tensors(outputs) if x.dim() > 0)
        for which, result in enumerate(outputs if isinstance(outputs, tuple | list) else (outputs,)):
            if isinstance(result, Tensor):
                seen = any(s is not None for s in states)
                state = self._state(call, name, states, result, which) if seen else None
                self.seen.put(result, state, written=call.writes)
            elif isinstance(result, int | float) and any(state is not None for state in states):
                self.read.add(result) if isinstance(result, float) else self.counted.add(result)

    def _state(self, call: Call, name: str, states: tuple[State, ...], result: Tensor, which: int) -> State:
        known = rule_of(name)
        if known is None and torch.Tag.pointwise in call.func.tags:
            known = name, elementwise
        if known is None:
            why = next((state for state in states if isinstance(state, Unproven)), None)
            return why or tried(call, states, result, which, self.facts.num_examples)
        shapes = tuple(tuple(x.shape) for x in call.inputs)
        operation = Operation(known[0], states, shapes, tuple(result.shape), which, call.bound.get)
        return ruled(known[1], self.facts, operation)
