# SPDX-License-Identifier: Apache-2.0
"""One forward call of a module, run again: on the batch, or on one example of it.

What runs is the module's *own code*: where children keep rules of their own, they are not run again but return what
they returned, and what goes into them counts as an output of the own code.

Shapes: B examples.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from clipping.reruns.checkpointing import without_checkpoints
from clipping.reruns.module_state import Held, ModuleState
from clipping.reruns.nested_values import Structure, floating_leaves, unflatten
from clipping.reruns.random_state import RandomState, Sources

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Strayed(RuntimeError):
    """A run that called other children than the forward did, or in another order."""


class ChildCall(NamedTuple):
    """One call of a child: how its outputs are put together, and the random state in which it ended.

    It took `num_inputs` floating-point tensors and returned `num_leaves` leaves; `number` counts the child's calls.
    """

    module: nn.Module
    number: int
    num_inputs: int
    structure: Structure
    num_leaves: int
    after: RandomState

    @property
    def kind(self) -> tuple[int, int, int, int]:
        """What calls of one kind have in common."""
        return id(self.module), self.number, self.num_inputs, self.num_leaves


class Place(NamedTuple):
    """Where a module below the rerun one keeps a trainable parameter, and the parameter's name in the model."""

    module: nn.Module
    key: str
    name: str


class Moment(NamedTuple):
    """What a forward began with and how it ended; `state` and `tensors` where the module changes itself."""

    before: RandomState
    after: RandomState
    moved: bool
    state: ModuleState | None
    tensors: tuple[tuple[Held, Tensor], ...]

    def without_foreign(self, leave_out: bool) -> Moment:
        """The same without Python's and numpy's generators, where nothing is drawn from them."""
        if not leave_out:
            return self
        return self._replace(before=self.before._replace(foreign=()), after=self.after._replace(foreign=()))


@dataclass(frozen=True, slots=True, eq=False)
class Rerun:
    """One forward call as it can be run again.

    Its leaves are those of the inputs (`structure`, `num_inputs`), then those that the children in `calls` returned.
    """

    module: nn.Module
    members: tuple[nn.Module, ...]
    places: tuple[Place, ...]
    structure: Structure
    num_inputs: int
    calls: tuple[ChildCall, ...]
    sources: Sources
    moment: Moment

    @contextmanager
    def prepared(self) -> Iterator[Run]:
        """Hands out a function that runs the own code; the modules are left as they were."""
        now = ModuleState.of(self.members)
        children = _Children(self.calls, self.sources)
        try:
            if self.moment.state is not None:
                self.moment.state.put_back()
            children.install(self.members)
            stateful = self.moment.state is not None or bool(self.moment.tensors)
            begun = ModuleState.of(self.members) if stateful else None
            with without_checkpoints():
                yield partial(self._run, children, begun)
        finally:
            now.put_back()

    def _run(
        self,
        children: _Children,
        begun: ModuleState | None,
        leaves: Sequence[object],
        variables: Mapping[str, Tensor],
    ) -> list[Tensor]:
        if self.moment.moved:
            self.sources.write(self.moment.before)
        if begun is not None:
            begun.put_back()
            for place, tensor in self.moment.tensors:
                place.put(tensor.clone())
        place_parameters(self.places, variables)
        children.begin(leaves[self.num_inputs :], replay=self.moment.moved)
        args, kwargs = _given(leaves[: self.num_inputs], self.structure)
        outputs = called(self.module, args, kwargs)
        children.finish()
        if self.moment.moved and not self.sources.read().same_foreign(self.moment.after):
            raise Strayed("Python's or numpy's generator was asked another number of times")
        return [*floating_leaves(outputs), *children.inputs]


Run = Callable[[Sequence[object], Mapping[str, Tensor]], list[Tensor]]
"""(leaves, parameters by name) -> floating-point outputs, then the floating-point inputs of the children."""


def _given(leaves: Sequence[object], structure: Structure) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = unflatten(leaves, structure)  # pyright: ignore[reportGeneralTypeIssues]
    return args, kwargs


def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """What the forward of `module` returns, after its pre-hooks; hooks on its outputs are outside of it.

    Pre-hooks set attributes (old-style weight and spectral norm, pruning); what they made of the inputs is in `args`.
    """
    hooked(module, args, kwargs)
    return module.forward(*args, **kwargs)


def hooked(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments as the pre-hooks of `module` leave them."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            both: Any = hook(module, args, kwargs)  # pyright: ignore[reportCallIssue]
            args, kwargs = (args, kwargs) if both is None else both
        else:
            found: Any = hook(module, args)
            args = args if found is None else found if isinstance(found, tuple) else (found,)
    return args, kwargs


def place_parameters(places: Sequence[Place], variables: Mapping[str, Tensor]) -> None:
    """Give the modules `variables` in the place of their parameters, and the others as constants."""
    flat: dict[int, nn.Module] = {}
    for module, key, name in places:
        known = module._parameters[key]
        assert known is not None
        found = variables[name] if name in variables else known.detach()
        module._parameters[key] = found  # pyright: ignore[reportArgumentType]
        if "_flat_weights" in vars(module):
            flat[id(module)] = module
    for module in flat.values():
        names = vars(module)["_flat_weights_names"]
        vars(module)["_flat_weights"] = [module._parameters.get(name) for name in names]


class _Children:
    """Stands in for the children: each call returns what it returned, and what went in is kept."""

    def __init__(self, calls: Sequence[ChildCall], sources: Sources) -> None:
        self.inputs: list[Tensor] = []
        self._calls = calls
        self._sources = sources
        self._next = 0
        self._replay = False
        self._leaves: Sequence[object] = ()

    def install(self, members: Sequence[nn.Module]) -> None:
        """Put the stand-ins in place, without hooks; nothing runs compiled."""
        for member in members:
            if vars(member).get("_compiled_call_impl") is not None:
                vars(member)["_compiled_call_impl"] = None
        for module in {id(call.module): call.module for call in self._calls}.values():
            vars(module)["forward"] = partial(self._call, module)
            vars(module).update((name, OrderedDict()) for name in _HOOKS)

    def begin(self, leaves: Sequence[object], *, replay: bool) -> None:
        """Start a run, whose children return `leaves`; `replay` moves the generators as they did."""
        self.inputs, self._next, self._leaves, self._replay = [], 0, leaves, replay

    def finish(self) -> None:
        """Raise where some children were not called."""
        if self._next != len(self._calls):
            raise Strayed("fewer of its children were called")

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> object:
        if self._next >= len(self._calls) or self._calls[self._next].module is not module:
            raise Strayed("its children were called in another order")
        call = self._calls[self._next]
        self._next += 1
        self.inputs += floating_leaves((args, kwargs))
        if self._replay:
            self._sources.write(call.after)
        leaves, self._leaves = self._leaves[: call.num_leaves], self._leaves[call.num_leaves :]
        return unflatten(leaves, call.structure)
