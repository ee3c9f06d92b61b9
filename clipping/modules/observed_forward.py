# SPDX-License-Identifier: Apache-2.0
"""A module's forward on a batch, watched once before it runs for good: what it calls, draws, keeps and changes.

Everything is left as it was: attributes, buffers, random generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from clipping.modules.children_with_rules import Arrivals, OwnRun
from clipping.modules.layers import Layer
from clipping.reruns.checkpointing import without_checkpoints
from clipping.reruns.module_state import Held, ModuleState, copied, held_tensors
from clipping.reruns.nested_values import Structure, flatten, floating_leaves, is_floating, unflatten
from clipping.reruns.random_state import Sources
from clipping.reruns.reruns import Moment, Place, Rerun, hooked, place_parameters

Serves = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], object], bool]
"""(recorded layer, arguments, outputs): whether it sees the batch, one row for each example."""


Expanded = Callable[
    [nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None
]
"""(recorded layer, arguments): the arguments with which it runs, None where they are those."""


class Subject(NamedTuple):
    """The module that is watched.

    `opened` are modules below it whose code counts as its own; all of them, if `whole`. `unruled` tells the recorded
    layers without a rule: what is below them is theirs to judge.
    """

    layer: Layer
    places: tuple[Place, ...]
    parameters: Mapping[str, Tensor]
    opened: tuple[nn.Module, ...]
    whole: bool
    serves: Serves
    expanded: Expanded
    unruled: Callable[[nn.Module], bool]

    @property
    def children(self) -> list[nn.Module]:
        """The modules that may stand apart when its own code calls them."""
        if self.whole:
            return []
        opened = set(map(id, self.opened))
        below = (x for x in self.layer.members if x is not self.layer.module and id(x) not in opened)
        return [x for x in below if not getattr(x, "inplace", False)]


class NotApart(Exception):
    """Children whose code must count as their parent's: they change what they are given, or serve all examples at once."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        super().__init__(*(type(module).__name__ for module in modules))
        self.modules = modules


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """What was seen.

    `leaves` are the inputs as the forward got them, `watched` (by position) what was given for them, `outputs` and `inputs`
    (of the children) tensors of one graph over `variables` and these. `changed` are tensors that the module holds and has changed,
    `mutated` the leaves that it has changed in place.
    """

    leaves: tuple[object, ...]
    structure: Structure
    variables: dict[str, Tensor]
    watched: dict[int, Tensor]
    returned: object
    outputs: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    run: OwnRun
    moment: Moment
    changed: tuple[Held, ...]
    mutated: tuple[int, ...]
    sources: Sources
    checkpointed: bool

    def rerun(self, subject: Subject) -> Rerun:
        """The forward, as it can be run again."""
        layer, calls = subject.layer, tuple(self.run.calls)
        return Rerun(
            layer.module,
            layer.members,
            subject.places,
            self.structure,
            len(self.leaves),
            calls,
            self.sources,
            self.moment,
        )

    @property
    def all_leaves(self) -> list[object]:
        """Those of the inputs, and those that the children returned, outside of any graph."""
        found = [*self.leaves, *self.run.leaves]
        return [x.detach() if isinstance(x, Tensor) else x for x in found]


def observe(subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any], sources: Sources) -> Observed:
    """Run the forward of `subject` on these inputs; raises `NotApart` where a child cannot stand apart."""
    members = subject.layer.members
    state, places = ModuleState.of(members), held_tensors(members)
    tensors = copied(places)
    variables = {name: p.detach().clone().requires_grad_() for name, p in subject.parameters.items()}
    leaves, structure = flatten((args, kwargs))
    watched = {i: x.detach().clone().requires_grad_() for i, x in enumerate(leaves) if is_floating(x)}  # pyright: ignore
    given = [watched[i].clone() if i in watched else x for i, x in enumerate(leaves)]
    with sources.preserved():
        before, run = sources.read(), OwnRun(Arrivals(), sources, frozenset(map(id, subject.opened)))
        try:
            for place, tensor in copied(places):
                place.put(tensor)
            working = [
                (place, tensor, tensor._version) for place in places if (tensor := place.tensor) is not None
            ]
            place_parameters(subject.places, variables)
            clean = ModuleState.of(members)
            with _Watching(subject, run, variables).hooked() as inputs, without_checkpoints() as met:
                passed = _forward(subject.layer.module, unflatten(given, structure))
            run.end()
            place_parameters(subject.places, variables)
            changed = tuple(p for p, t, version in working if p.tensor is not t or t._version != version)
            state_changed = clean.changed() or bool(changed)
        finally:
            state.put_back()
        kept = tuple((place, tensor) for place, tensor in tensors if place in changed)
        after = sources.read()
        foreign = not after.same_foreign(before)
        moment = Moment(before, after, run.moved, state if state_changed else None, kept).without_foreign(
            not foreign
        )
    outputs = tuple(floating_leaves(passed.outputs))
    return Observed(
        passed.leaves, passed.structure, variables, watched, passed.outputs, outputs, tuple(inputs),
        run, moment, changed, passed.mutated, sources._replace(foreign=foreign), bool(met),
    )  # fmt: skip


class _Passed(NamedTuple):
    leaves: tuple[object, ...]
    structure: Structure
    outputs: object
    mutated: tuple[int, ...]


def _forward(module: nn.Module, given: Any) -> _Passed:
    """Run the pre-hooks and the forward; the inputs as the forward got them are copies."""
    leaves, structure = flatten(hooked(module, *given))
    kept = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in leaves)
    versions = [x._version if isinstance(x, Tensor) else 0 for x in leaves]
    args, kwargs = unflatten(leaves, structure)  # pyright: ignore[reportGeneralTypeIssues]
    outputs = module.forward(*args, **kwargs)
    after = (x._version if isinstance(x, Tensor) else 0 for x in leaves)
    mutated = tuple(i for i, (a, b) in enumerate(zip(versions, after, strict=True)) if a != b)
    return _Passed(kept, structure, outputs, mutated)


class _Watching:
    """Hooks on everything below the module: children are told apart, and run on constants."""

    def __init__(self, subject: Subject, run: OwnRun, variables: Mapping[str, Tensor]) -> None:
        self._subject = subject
        self._run = run
        self._variables = variables
        self._inputs: list[Tensor] = []
        self._stack: list[tuple[nn.Module, list[tuple[Tensor, int]]]] = []

    @contextmanager
    def hooked(self) -> Iterator[list[Tensor]]:
        """Hands out the list to which the inputs of the children are added."""
        handles = []
        try:
            for child in self._subject.children:
                handles.append(child.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
                handles.append(child.register_forward_hook(self._leave, with_kwargs=True))
            yield self._inputs
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = self._run.enter(module, args, kwargs)
        if given is not None:
            args, kwargs = given
            below = {id(x) for x in module.modules()}
            place_parameters([p for p in self._subject.places if id(p.module) in below], {})
            self._inputs += floating_leaves(given)
        if not any(self._subject.unruled(known) for known, _ in self._stack):
            given = self._subject.expanded(module, args, kwargs) or given
        tensors = [x for x in flatten(given or (args, kwargs))[0] if isinstance(x, Tensor)]
        self._stack.append((module, [(x, x._version) for x in tensors]))
        return given

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, outputs: object) -> None:
        around = tuple(known for known, _ in self._stack)
        _, tensors = self._stack.pop()
        outermost = not self._stack
        judged = any(self._subject.unruled(x) for x in around[:-1])
        changed = outermost and any(x._version != version for x, version in tensors)
        if changed or not (judged or self._subject.serves(module, args, kwargs, outputs)):
            raise NotApart(around)
        self._run.leave(module, outputs)
        if outermost:
            place_parameters(self._subject.places, self._variables)
