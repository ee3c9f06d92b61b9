# SPDX-License-Identifier: Apache-2.0
"""Calls of modules without a rule: how each is differentiated, and what must be kept of a forward to run it again.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from clipping.frames import Opening
from clipping.grads import SampleGrads
from clipping.layers import Layer
from clipping.manners import Manner, examples_of, ratios
from clipping.module_state import ModuleState, copied, held_tensors
from clipping.observed import Expanded, Serves, Subject
from clipping.own_code import Arrivals, Mark, OwnRun
from clipping.random_state import RandomState, Sources
from clipping.rules.draws import Unreplayable
from clipping.rules.examples import LOOP, Batch, BatchDims
from clipping.rules.generic import generic
from clipping.rules.reruns import ChildCall, Moment, Place, Rerun, Strayed, floating_leaves
from clipping.structures import Structure, flatten, unflatten
from clipping.trials import settle


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """What is kept of a forward that has begun."""

    manner: Manner
    before: RandomState
    state: ModuleState | None
    tensors: tuple[Any, ...]
    kept: Mapping[int, Tensor]
    arrivals: Arrivals
    opening: Opening | None


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """One forward as it can be differentiated: its leaves are the rerun's, then outputs that must come again."""

    manner: Manner
    rerun: Rerun
    num_examples: int
    leaves: tuple[object, ...]
    arrivals: Arrivals | None

    def recorded(self, layer: Layer) -> Layer:
        """`layer` with the names of those parameters only that are its record's to explain."""
        names = {local: name for local, name in layer.names.items() if name in self.manner.names}
        return layer._replace(names=names)

    @property
    def handed_out(self) -> tuple[object, ...]:
        """What the children returned, tensors aside."""
        if self.arrivals is None:
            return ()
        return tuple(x for x in self.leaves[self.rerun.num_inputs :] if not isinstance(x, Tensor))

    @property
    def num_leaves(self) -> int:
        """How many of the leaves are the rerun's."""
        return self.rerun.num_inputs + sum(call.num_leaves for call in self.rerun.calls)


class Unruled:
    """The manner of each module without a rule, settled when a call of a new kind comes.

    `serves` tells whether a recorded layer below such a module sees the batch, `expanded` with what arguments it runs;
    `layers` are all recorded ones.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        parameters: Mapping[str, nn.Parameter],
        batch_dim: int,
        serves: Serves,
        expanded: Expanded,
    ) -> None:
        self._parameters = parameters
        self._batch_dim = batch_dim
        self._serves = serves
        self._expanded = expanded
        self._without_rule = {id(layer.module) for layer in layers if layer.rule is None}
        self._manners: dict[tuple[object, ...], Manner] = {}
        self._doubted: set[tuple[object, ...]] = set()

    def doubt(self) -> None:
        """Prove everything again: a branch that starts at zero mixes only once it has been trained."""
        self._doubted = set(self._manners)

    def manner(
        self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], hint: int | None, *, now: bool
    ) -> tuple[Manner, int]:
        """How to differentiate this call, and of how many examples it is; `now` allows a trial."""
        leaves, _ = flatten((args, kwargs))
        found = examples_of(leaves, hint, self._batch_dim)
        num_examples = 0 if found is None else found
        key = (id(layer.module), layer.module.training, *map(_kind, leaves))
        known = self._manners.get(key)
        fits = known is not None and num_examples > 0 and _fits(known, leaves, num_examples)
        settled = key not in self._doubted or num_examples <= 1 or not now
        if known is not None and fits and settled:
            return known, num_examples
        if num_examples <= 1 or not now:
            return self._single(layer, len(leaves), num_examples), num_examples
        manner = self._settle(layer, args, kwargs, num_examples)
        self._doubted.discard(key)
        if manner.proven:
            self._manners[key] = manner
        return manner, num_examples

    def _settle(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], num_examples: int) -> Manner:
        sources = Sources.of(layer.members, foreign=True)
        return settle(self._subject(layer), args, kwargs, num_examples, self._batch_dim, sources)

    def _subject(self, layer: Layer) -> Subject:
        places = places_of(layer)
        parameters = {place.name: self._parameters[place.name] for place in places}
        return Subject(layer, places, parameters, layer.inlined, False, self._serves, self._expanded, self._is_unruled)

    def _is_unruled(self, module: nn.Module) -> bool:
        return id(module) in self._without_rule

    def _single(self, layer: Layer, num_leaves: int, num_examples: int) -> Manner:
        """One example, or none: the module runs again as it ran, all of it."""
        dims = BatchDims((None,) * num_leaves, ())
        changed = tuple(held_tensors(layer.members)) if num_examples else ()
        every = tuple(range(num_leaves)) if num_examples else ()
        sources = Sources.of(layer.members, foreign=False)
        return Manner(
            False, None, dims, {}, (), places_of(layer), (), sources, (), every, changed, bool(num_examples),
            why="a batch of one example",
        )  # fmt: skip

    # -- one forward ----------------------------------------------------------------------------------------

    def begin(
        self, layer: Layer, manner: Manner, args: tuple[Any, ...], kwargs: dict[str, Any], anchor: Tensor
    ) -> Begun:
        """Keep what the forward may change."""
        leaves, _ = flatten((args, kwargs))
        kept = {i: x.detach().clone() for i in manner.mutated if isinstance(x := leaves[i], Tensor)}
        state = ModuleState.of(layer.members) if manner.stateful else None
        arrivals = Arrivals()
        opening = self._opening(layer, manner, arrivals, anchor) if manner.own else None
        return Begun(manner, manner.sources.read(), state, tuple(copied(manner.changed)), kept, arrivals, opening)

    def _opening(self, layer: Layer, manner: Manner, arrivals: Arrivals, anchor: Tensor) -> Opening:
        names = sorted(manner.names)
        marked = Mark.apply(arrivals, anchor, *(self._parameters[name].detach() for name in names))
        opened = frozenset(map(id, (layer.module, *manner.opened)))
        run = OwnRun(arrivals, manner.sources, opened)
        return Opening(manner.places, dict(zip(names, marked, strict=True)), opened, run)

    def ended(
        self, layer: Layer, begun: Begun, num_examples: int, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: object
    ) -> Kept:
        """All that is needed to differentiate the forward."""
        manner, sources = begun.manner, begun.manner.sources
        leaves, structure = flatten((args, kwargs))
        num_inputs = len(leaves)
        leaves = [begun.kept.get(i, x) for i, x in enumerate(leaves)]
        calls, after = (), sources.read()
        moved = not after.same(begun.before)
        if begun.opening is not None:
            run = begun.opening.run
            run.end()
            moved, calls = run.moved, tuple(run.calls)
            leaves += run.leaves
            if not manner.knows(calls):
                manner = self._widened(layer, begun, calls, leaves, structure, num_examples)
        moment = Moment(begun.before, after, moved, begun.state, begun.tensors)
        rerun = Rerun(layer.module, layer.members, places_of(layer), structure, num_inputs, calls, sources, moment)
        checked = moved or manner.engine is LOOP
        leaves += floating_leaves(outputs) if checked else []
        return Kept(manner, rerun, num_examples, tuple(leaves), begun.arrivals if manner.own else None)

    def _widened(
        self,
        layer: Layer,
        begun: Begun,
        calls: Sequence[ChildCall],
        leaves: Sequence[object],
        structure: Structure,
        num_examples: int,
    ) -> Manner:
        """The manner of a forward that called children as no trial has seen, by a trial with the numbers that it drew."""
        manner, sources = begun.manner, begun.manner.sources
        if num_examples == 1:  # all rows are the example's
            return replace(manner, children={**_of_one(calls, leaves), **manner.children})
        with sources.preserved():
            sources.write(begun.before)
            args, kwargs = unflatten(leaves[: len(manner.dims.inputs)], structure)  # pyright: ignore
            found = self._settle(layer, args, kwargs, num_examples)
        if not found.own or not found.knows(calls):
            raise RuntimeError(
                f"expected module {layer.name or 'model'!r} to call its children as on the first batch; got others, which "
                "cannot be told apart from it; call the same children in every forward"
            )
        key = next((key for key, known in self._manners.items() if known is manner), None)
        manner = replace(manner, children={**found.children, **manner.children})
        if key is not None:
            self._manners[key] = manner
        return manner

    # -- gradients --------------------------------------------------------------------------------------------

    def gradients(
        self, layer: Layer, kept: Kept, leaves: Sequence[object], grads: Sequence[Tensor | None]
    ) -> dict[str, SampleGrads]:
        """Per-example gradients by the module's own parameter names."""
        manner = kept.manner
        refuse_shared(layer, manner, grads)
        parameters = {name: self._parameters[name] for name in manner.names}
        dims = manner.dims_of(kept.rerun.calls)
        batch = Batch(leaves[: kept.num_leaves], dims, kept.num_examples, None)
        outputs: Any = leaves[kept.num_leaves :]
        try:
            found = generic(kept.rerun, manner.engine, batch, parameters, grads, outputs, manner.why)
        except (Unreplayable, Strayed) as error:
            raise _cannot_replay(layer, error) from error
        local = {name: local for local, name in reversed(layer.names.items())}
        return {local[name]: value for name, value in found.items()}


def places_of(layer: Layer) -> tuple[Place, ...]:
    """Where the module and those below it keep their trainable parameters."""
    found = []
    for local, name in layer.names.items():
        path, _, key = local.rpartition(".")
        found.append(Place(layer.module.get_submodule(path), key, name))
    return tuple(found)


def _of_one(calls: Sequence[ChildCall], leaves: Sequence[object]) -> dict[Any, BatchDims]:
    """Where the batch of one example is in what children return and take: anywhere."""
    found, start = {}, len(leaves) - sum(call.num_leaves for call in calls)
    for call in calls:
        returned = leaves[start : start + call.num_leaves]
        start += call.num_leaves
        dims = tuple(0 if isinstance(x, Tensor) and x.dim() > 0 else None for x in returned)
        found[call.kind] = BatchDims(dims, (0,) * call.num_inputs)
    return found


def _kind(value: object) -> object:
    return (value.dim(), value.dtype) if isinstance(value, Tensor) else type(value)


def _fits(manner: Manner, leaves: Sequence[object], num_examples: int) -> bool:
    dims = manner.dims.inputs
    return len(dims) == len(leaves) and ratios(dims, leaves, num_examples) == manner.rows


def refuse_shared(layer: Layer, manner: Manner, grads: Sequence[Tensor | None]) -> None:
    """Raise ValueError where a gradient arrived at an output that all examples share."""
    for grad, dim in zip(grads, manner.dims.outputs, strict=False):
        if grad is not None and dim is None:
            raise ValueError(
                f"expected each example's loss to depend on its own rows of what module {layer.name or 'model'!r} returns; "
                f"got a gradient of an output of shape {tuple(grad.shape)} that all examples share, which is summed over "
                "them before it can be clipped; return it for each example (penalty.expand(len(x))), or leave it to "
                "the optimizer's weight_decay"
            )


def _cannot_replay(layer: Layer, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"expected module {layer.name or 'model'!r} ({type(layer.module).__name__}), which has no rule of its own, to run "
        f"again as it ran; got another run ({error}); under torch.compile set "
        "torch._inductor.config.fallback_random = True, or move what draws into a module without parameters"
    )
