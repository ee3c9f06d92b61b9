# SPDX-License-Identifier: Apache-2.0
"""One forward of a model, followed operation by operation: its shared values, and where each of them meets the examples.

Shapes: B examples, R rows that the model is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from clipping.errors import UnrecordedParameter
from clipping.modules.layers import Layer
from clipping.modules.replay import Origin
from clipping.rules.registry import Inputs
from clipping.shared_values.example_free import Constants, Operation, Unbatched, tensors_of
from clipping.shared_values.first_meetings import (
    Deliver,
    Meeting,
    Met,
    Place,
    Split,
    Valve,
    place_of,
    rows_of,
)
from clipping.shared_values.shared_calls import SharedCall, Source, StandIn

ROWS = "rows"
"""The outputs have one row for each example: an ordinary call."""

FOLLOWED = "followed"
"""The outputs go through other operations before they meet the examples."""

_SHAPE = frozenset(("shape", "ndim", "size", "dim", "__len__", "numel"))


class Key(NamedTuple):
    """A call of a layer: which layer, the how-manieth of this forward, and the dimensions of its output."""

    layer: str
    number: int
    num_dims: int


@dataclass(frozen=True, slots=True)
class Spread:
    """The outputs of a call are expanded to the rows of the batch, `lead` dimensions added in front."""

    lead: int


Use = str | Spread


class _Escaped(NamedTuple):
    """The hook on what a shared value is made of: its gradient came by another way than by rows."""

    name: str

    def __call__(self, value: Tensor) -> None:
        """Refuse the gradient, if there is one."""
        if value.grad is not None:
            value.grad = None
            raise UnrecordedParameter(
                f"expected {self.name!r}, which serves all examples at once, to meet them inside the model, in an operation "
                "whose result has one row for each; got a gradient by another way, summed over the examples already; "
                "expand it to the batch where it is used, or freeze it"
            )


def leaf_of(value: Tensor, name: str) -> Tensor:
    """`value` cut off: a gradient that comes back to it by another way than by rows is refused."""
    made = value.detach().requires_grad_()
    made.register_post_accumulate_grad_hook(_Escaped(name))
    return made


class Home(NamedTuple):
    """What all forwards of a tape share.

    The names of its parameters, by id; what stays from one forward to the next; the leaf on which the nodes of meetings
    stand; who is told of meetings where they are made; what they deliver to; and operations whose results were once seen
    not to have the examples in their first dimension: where its size fits the batch's by chance, they have not either.
    `valve` is open while the gradients of examples go back to what shared values are made of.
    """

    parameters: Mapping[int, str]
    constants: Constants
    anchor: Tensor
    register: Callable[[Meeting], None]
    deliver: Deliver
    rowless: set[tuple[str, ...]]
    valve: list[bool]


class Forward:
    """One forward that is followed: its shared values, and how each of them was used."""

    def __init__(self, rows: int, home: Home, origin: Origin) -> None:
        self.rows = rows
        self.values = Unbatched(home.constants, self)
        self.uses: dict[Key, set[Use]] = {}
        self.stands_in = False
        self._home = home
        self._origin = origin
        self._stand_ins: dict[int, Tensor] = {}
        self._direct: dict[int, Key] = {}
        self._keys: dict[Source, Key] = {}
        self._met: dict[tuple[int, Place], tuple[Tensor, Tensor]] = {}

    # -- layers and parameters ----------------------------------------------------------------------------

    def stand_in(self, parameter: nn.Parameter) -> Tensor | None:
        """The stand-in of a trainable parameter of the model that is used outside of its layer."""
        name = self._home.parameters.get(id(parameter))
        if name is None or not parameter.requires_grad:
            return None
        if id(parameter) not in self._stand_ins:
            made = self._stand_ins[id(parameter)] = leaf_of(parameter, name)
            self.values.note(made, known=True, sources=frozenset((StandIn(name, made),)))
            self.stands_in = True
        return self._stand_ins[id(parameter)]

    def serves_all(self, outputs: Sequence[Tensor]) -> bool:
        """Whether no example entered the outputs of a layer, and they are not what the only example would have."""
        if self.rows == 1 and all(x.shape[:1] == (1,) and not self.values.sources(x) for x in outputs):
            return False
        return all(self.values.is_known(x) or self.values.sources(x) for x in outputs)

    def call(
        self, layer: Layer, key: Key, inputs: Inputs, outputs: Sequence[Tensor], autocast: Sequence[Any]
    ) -> list[Tensor]:
        """What a layer hands out whose outputs serve all examples."""
        made = [x if x.requires_grad else leaf_of(x, layer.name) for x in outputs]
        edges = [get_gradient_edge(x) if x.grad_fn is not None else x for x in made]
        detached = pytree.tree_map(_detached, (inputs.args, dict(inputs.kwargs)))
        source = SharedCall(layer, Inputs(*detached), edges, [x.shape for x in outputs], autocast)
        # A copy, no leaf: the model may change it in place.
        handed = [x if x.grad_fn is not None else x.clone() for x in made]
        for value, output in zip(handed, outputs, strict=True):
            before, known = self.values.sources(output), self.values.is_known(output)
            self.values.note(value, known=known, sources=before | {source})
        self.uses[key] = set() if len(handed) == 1 else {FOLLOWED}
        self._keys[source] = key
        if len(handed) == 1:
            self._direct[id(handed[0])] = key
        return handed

    # -- operations -----------------------------------------------------------------------------------------

    def used(self, operation: Operation, shared: Sequence[Tensor], result: Any) -> None:
        """An operation on shared values and constants alone."""
        if result is not None and any(result is x for x in shared):
            return
        for value in shared:
            self._use(value, "shape" if operation.name in _SHAPE else FOLLOWED)

    def _use(self, value: Tensor, use: Use) -> None:
        key = self._direct.get(id(value))
        keys = (
            [key]
            if key is not None
            else [self._keys[x] for x in self.values.sources(value) if x in self._keys]
        )
        for known in keys:
            self.uses[known].add(use if key is not None else FOLLOWED)

    def meets(self, operation: Operation, shared: Sequence[Tensor]) -> tuple[Any, bool]:
        """An operation on shared values and others."""
        leaves = self._operands(operation)
        rows = rows_of(operation, leaves)
        if rows is not None and not self._has_rows(operation, shared, rows):
            self._all(shared, FOLLOWED)
            return self._parted(operation, shared).run(), True
        hooks: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
        saves = hooks._top_saved_tensors_default_hooks(False) is not None
        places = {id(x): place_of(operation, x, leaves, saves) for x in shared}
        if rows is None or None in places.values():
            self._all(shared, FOLLOWED)
            return self._split(operation, shared)
        made: dict[int, Tensor] = {}
        for value in shared:
            place = places[id(value)]
            assert place is not None
            self._use(value, self._manner(place))
            made[id(value)] = self._meet(operation, value, place)
        self._refuse_overwritten(operation, shared)
        return _with(operation, made).run(), False

    def _parted(self, operation: Operation, shared: Sequence[Tensor]) -> Operation:
        """The operation on values whose gradient goes no further in an ordinary backward, where no example entered them.

        Others carry the gradient of what entered them too, and are cut off further down already.
        """
        known = [x for x in shared if self.values.is_known(x)]
        return _with(operation, {id(x): Valve.apply(self._home.valve, x) for x in known})

    def _operands(self, operation: Operation) -> list[Tensor]:
        if operation.name == "__setitem__":
            target, index, given = operation.args
            return [target[index], *tensors_of((given,))]
        return list(tensors_of((operation.args, operation.kwargs)))

    def _has_rows(self, operation: Operation, shared: Sequence[Tensor], rows: int) -> bool:
        """Whether the first dimension of a result, of size `rows`, is that of the examples."""
        names = {name for value in shared for source in self.values.sources(value) for name in source.names}
        key = (operation.name, str(shared[0].dim()), *sorted(names))
        if self.rows and (rows == 0 or rows % self.rows):
            self._home.rowless.add(key)
        return key not in self._home.rowless and (rows == 0) == (self.rows == 0)

    def _manner(self, place: Place) -> Use:
        if place.rows != self.rows or place.kind not in ("broadcast", "aligned"):
            return FOLLOWED
        return ROWS if place.kind == "aligned" else Spread(place.lead)

    def _all(self, shared: Sequence[Tensor], use: Use) -> None:
        for value in shared:
            self._use(value, use)

    def _refuse_overwritten(self, operation: Operation, shared: Sequence[Tensor]) -> None:
        if operation.name.endswith("_") and any(operation.args[0] is x for x in shared):
            raise TypeError(
                f"expected a value that serves all examples to stay as it is; got {operation.name!r} on it, which adds examples to "
                "it in place; use an operation that returns a new tensor (x = x + y)"
            )

    def _meeting(self, operation: Operation, value: Tensor, place: Place) -> Meeting:
        sources = self.values.sources(value)
        names = tuple(sorted({name for source in sources for name in source.names}))
        entered = not self.values.is_known(value)
        meeting = Meeting(
            place, value, sources, names, operation.name, self._origin, self._home.deliver, entered
        )
        self._home.register(meeting)
        return meeting

    def _meet(self, operation: Operation, value: Tensor, place: Place) -> Tensor:
        known = self._met.get((id(value), place))
        if known is None:
            met = Met.apply(self._meeting(operation, value, place), self._home.anchor, value)
            known = self._met[id(value), place] = (value, met)  # the value, so that its id stays its own
        return known[1]

    def _split(self, operation: Operation, shared: Sequence[Tensor]) -> tuple[Any, bool]:
        if operation.name.endswith("_"):  # what changes in place cannot be run again
            return operation.run(), True
        result = self._parted(operation, shared).run()
        whole = isinstance(result, Tensor) and result.dim() > 0 and result.requires_grad
        if not whole or not self._has_rows(operation, shared, result.shape[0]):
            return result, True
        place = Place("other", result.shape[0])
        meetings = tuple(self._meeting(operation, x, place) for x in shared)
        return Split.apply(meetings, self._home.anchor, operation, result, *shared), False

    def finish(self) -> None:
        """The forward has ended."""
        self.values.finish()
        self._met.clear()
        self._direct.clear()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _with(operation: Operation, made: Mapping[int, Tensor]) -> Operation:
    def replace(value: Any) -> Any:
        if isinstance(value, Tensor):
            return made.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(replace(x) for x in value)
        return value

    kwargs = {name: replace(value) for name, value in operation.kwargs.items()}
    return operation._replace(args=replace(operation.args), kwargs=kwargs)
