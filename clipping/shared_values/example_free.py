# SPDX-License-Identifier: Apache-2.0
"""Follows the values of one forward that no example enters: what is made of parameters and constants alone.

Positions, relative biases, prompts and learned queries are such values. What is asked of them is not their shape,
where the length of a sequence may be the size of the batch, but what they were made of.

Known are parameters, buffers, tensors that modules held when the tape was attached, what factories make, what is made of
these, and integers that were there before (tables of positions are cached in many places). Everything else, also what
was never seen being made, counts as made from examples.

To take examples for constants costs time, not privacy: where the value that they entered meets other examples, its
gradient is split by the rows of the result all the same. To take constants for examples would be a fault.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LIKE_FIRST = frozenset(("type_as", "to", "expand_as", "view_as", "reshape_as"))
"""Functions that take nothing but type, device or shape from their later arguments."""

_SHAPED = frozenset(("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"))
"""Methods that take nothing but type and device from their tensor."""

_SHOWN = frozenset(("shape", "ndim"))


class Operation(NamedTuple):
    """A function called on tensors."""

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """Its result."""
        return self.function(*self.args, **self.kwargs)


class Follower(Protocol):
    """Who is asked about operations on shared values: those of `Unbatched` that a parameter reached."""

    def stand_in(self, parameter: nn.Parameter) -> Tensor | None:
        """What is used in place of a trainable parameter outside of its layer; None where it is left alone."""
        ...

    def used(self, operation: Operation, shared: Sequence[Tensor], result: Any) -> None:
        """`operation` made `result` of shared values and constants, or looked at the shape of one."""
        ...

    def meets(self, operation: Operation, shared: Sequence[Tensor]) -> tuple[Any, bool]:
        """Run an operation on shared values and others; whether its result is still one row for all examples."""
        ...


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among `values`, in lists, tuples and dicts too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_of(value)
        elif isinstance(value, dict):
            yield from tensors_of(value.values())


class Constants:
    """Tensors that stay from one forward to the next and that no example entered."""

    def __init__(self, model: nn.Module) -> None:
        held = (tensors_of(vars(module).values()) for module in model.modules())
        self._found = [ref(x) for values in held for x in values]
        self._model = model

    def now(self) -> dict[int, Tensor]:
        """Those that are alive, parameters and buffers among them, by id."""
        alive = [x for known in self._found if (x := known()) is not None]
        return {id(x): x for x in (*alive, *self._model.parameters(), *self._model.buffers())}

    def keep(self, known: Mapping[int, Tensor], before: Mapping[int, Tensor]) -> None:
        """Remember what a forward made of constants alone, as far as somebody else holds it: modules have caches."""
        self._found = [x for x in self._found if x() is not None]
        self._found += [ref(x) for key, x in known.items() if key not in before and not x.requires_grad]


class Unbatched(TorchFunctionMode):
    """The mode of one forward: which tensors are known, and which parameters reached those that carry a gradient.

    A shared value is one that carries the gradient of some `sources`; it need not be known, where data that are not
    rows of examples entered it.
    """

    def __init__(self, constants: Constants, follower: Follower) -> None:
        super().__init__()
        self._constants = constants
        self._before = constants.now()
        self._known = dict(self._before)
        self._sources: dict[int, tuple[Tensor, frozenset[Any]]] = {}
        self._entered: dict[int, Tensor] = {}
        self._written: dict[int, Tensor] = {}
        self._follower = follower
        self.aside = False
        """Whether what runs now is no part of the forward."""

    def is_known(self, value: Tensor) -> bool:
        """Whether no example entered `value`."""
        if id(value) not in self._known:
            return _is_integer(value) and id(value) not in self._entered
        return not self._written or value.untyped_storage().data_ptr() not in self._written

    def sources(self, value: Tensor) -> frozenset[Any]:
        """What the gradient of a shared value reaches; empty for other tensors."""
        found = self._sources.get(id(value))
        return frozenset() if found is None else found[1]

    def note(self, value: Tensor, *, known: bool, sources: frozenset[Any] = frozenset()) -> None:
        """Tell what `value` was made of."""
        # Held until the forward ends: another tensor cannot get its id.
        if known:
            self._known[id(value)] = value
        else:
            self._known.pop(id(value), None)
            if _is_integer(value):
                self._entered[id(value)] = value
        if sources:
            self._sources[id(value)] = (value, sources)
        else:
            self._sources.pop(id(value), None)

    def finish(self) -> None:
        """The forward has ended: let go of its tensors."""
        self._constants.keep(self._known, self._before)
        self._known.clear()
        self._sources.clear()
        self._entered.clear()
        self._written.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, and note what its results were made of."""
        kwargs = kwargs or {}
        if self.aside or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor):
                self._shown(func, args)
                return result
        if torch._C._functorch.maybe_current_level() is not None:  # pyright: ignore[reportAttributeAccessIssue]
            return func(*args, **kwargs)
        return self._run(Operation(func, name, tuple(args), dict(kwargs)))

    def _shown(self, func: Any, args: Sequence[Any]) -> None:
        if id(args[0]) in self._sources and getattr(func.__self__, "__name__", "") in _SHOWN:
            self._follower.used(Operation(func, "shape", tuple(args), {}), (args[0],), None)

    def _run(self, operation: Operation) -> Any:
        operation = self._standing_in(operation)
        leaves = list(tensors_of((operation.args, operation.kwargs)))
        shared = [x for x in leaves if id(x) in self._sources]
        if operation.name in _LIKE_FIRST:
            leaves = leaves[:1]
        elif operation.name in _SHAPED:
            leaves = leaves[1:]
        known = all(self.is_known(x) for x in leaves)
        if not (shared and torch.is_grad_enabled()):
            result = operation.run()
            self._noted(operation, result, leaves, known, frozenset())
            return result
        sources = frozenset().union(*(self.sources(x) for x in shared))
        if known or all(self.is_known(x) or id(x) in self._sources for x in leaves):
            result = operation.run()
            self._noted(operation, result, leaves, known, sources)
            self._follower.used(operation, shared, result)
            return result
        result, still_shared = self._follower.meets(operation, shared)
        self._noted(operation, result, leaves, False, sources if still_shared else frozenset())
        return result

    def _standing_in(self, operation: Operation) -> Operation:
        if not any(isinstance(x, nn.Parameter) for x in tensors_of((operation.args, operation.kwargs))):
            return operation
        args, kwargs = _replaced((operation.args, operation.kwargs), self._stand_in)
        return operation._replace(args=args, kwargs=kwargs)

    def _stand_in(self, value: Tensor) -> Tensor:
        found = self._follower.stand_in(value) if isinstance(value, nn.Parameter) else None
        return value if found is None else found

    def _noted(
        self,
        operation: Operation,
        result: Any,
        leaves: Sequence[Tensor],
        known: bool,
        sources: frozenset[Any],
    ) -> None:
        if operation.name == "__setitem__" and leaves:
            self._write(operation.args[0], known, sources)
        for made in tensors_of((result,)):
            if any(made is x for x in leaves):
                self._write(made, known, sources)
            else:
                self.note(made, known=known, sources=sources if made.requires_grad else frozenset())

    def _write(self, target: Tensor, known: bool, sources: frozenset[Any]) -> None:
        """What an operation returned is one of its arguments: changed in place, or handed through."""
        if not known and id(target) in self._known:
            # Held, like all the others: its memory cannot become another tensor's.
            self._written[target.untyped_storage().data_ptr()] = target
        self.note(
            target,
            known=known,
            sources=(sources | self.sources(target)) if target.requires_grad else frozenset(),
        )


def _is_integer(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _replaced(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return replace(value)
    if type(value) in (tuple, list):
        return type(value)(_replaced(x, replace) for x in value)
    if type(value) is dict:
        return {key: _replaced(x, replace) for key, x in value.items()}
    return value
