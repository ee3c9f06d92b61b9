# SPDX-License-Identifier: Apache-2.0
"""Calls of modules without a rule: how each is differentiated, and what must be kept of a forward to run it again.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from clipping.errors import MixesExamples
from clipping.gradients.sample_grads import SampleGrads
from clipping.modules.children_with_rules import Arrivals, Mark, OwnRun
from clipping.modules.choice import settle
from clipping.modules.detached_forward import Opening
from clipping.modules.differentiation import Manner, Size, examples_of, ratios
from clipping.modules.generic_rule import generic, marks_of
from clipping.modules.layers import Layer
from clipping.modules.observed_forward import Expanded, Serves, Subject
from clipping.reruns.draws import Unreplayable
from clipping.reruns.module_state import ModuleState, copied
from clipping.reruns.nested_values import Structure, flatten, floating_leaves, unflatten
from clipping.reruns.one_example import Batch, BatchDims
from clipping.reruns.random_state import RandomState, Sources
from clipping.reruns.reruns import ChildCall, Moment, Place, Rerun, Strayed
from clipping.rules.dropouts import draws_masks, layer_batch_dim


@dataclass(frozen=True, slots=True, eq=False)
class Begun:
    """What is kept of a forward that has begun."""

    manner: Manner
    num_examples: int
    before: RandomState
    state: ModuleState | None
    tensors: tuple[Any, ...]
    kept: Mapping[int, Tensor]
    arrivals: Arrivals
    opening: Opening | None


class Kept(NamedTuple):
    """One forward as it can be differentiated, but for its tensors: they are saved as autograd saves them.

    `marks` are the fingerprints of what the own code gave out.
    """

    manner: Manner
    rerun: Rerun
    num_examples: int
    marks: tuple[Tensor | None, ...]

    def recorded(self, layer: Layer) -> Layer:
        """`layer` with the names of those parameters only that are its record's to explain."""
        names = {local: name for local, name in layer.names.items() if name in self.manner.names}
        return layer._replace(names=names)


class Ran(NamedTuple):
    """A forward that has ended: `leaves` are the rerun's; `wait` for its children."""

    kept: Kept
    leaves: list[object]
    wait: Arrivals | None

    @property
    def handed_out(self) -> list[object]:
        """What the children returned."""
        return self.leaves[self.kept.rerun.num_inputs :] if self.wait is not None else []


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
        self._manners: dict[tuple[Any, ...], Manner] = {}
        self._latest: dict[tuple[Any, ...], Manner] = {}
        self._doubted: set[tuple[Any, ...]] = set()

    def doubt(self) -> None:
        """Prove everything again: a branch that starts at zero mixes only once it has been trained."""
        self._doubted = set(self._manners)

    def _manner(
        self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], hint: int | None, *, now: bool
    ) -> tuple[Manner, int]:
        leaves, _ = flatten((args, kwargs))
        batch_dim = layer_batch_dim(layer.module)
        hint = hint if batch_dim in (None, self._batch_dim) else None
        found = examples_of(leaves, hint, self._batch_dim if batch_dim is None else batch_dim)
        num_examples = 0 if found is None else found
        if found is None or (found == 1 and hint is not None and hint > 1):  # one call for all examples
            return self._single(layer, len(leaves)), 1
        kind = (id(layer.module), layer.module.training, *map(_kind, leaves))
        # A mask (T, T) that all examples share looks like a batch where T happens to be B: a kind of its own.
        key = (kind, *(isinstance(x, Tensor) and num_examples in x.shape for x in leaves))
        if num_examples == 1 and not self._known(key, leaves, 1):
            key = (*key, 1)  # which shows nothing of larger batches
        known = self._known(key, leaves, num_examples)
        if known is not None and (key not in self._doubted or not now):
            return known, num_examples
        if num_examples == 0 or not now:
            return self._latest.get(key) or self._single(layer, len(leaves)), num_examples
        alike = [x.dims.inputs for other, x in self._manners.items() if other[0] == kind]
        manner = self._settle(layer, args, kwargs, num_examples, alike)
        self._doubted.discard(key)
        self._latest[key] = manner
        if manner.proven:
            self._manners[key] = manner
        return manner, num_examples

    def _known(self, key: tuple[Any, ...], leaves: Sequence[object], num_examples: int) -> Manner | None:
        known = self._manners.get(key)
        if known is None or num_examples == 0 or len(known.dims.inputs) != len(leaves):
            return None
        return known if ratios(known.dims.inputs, leaves, num_examples) == known.rows else None

    def _settle(
        self,
        layer: Layer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_examples: int,
        alike: Sequence[tuple[int | None, ...]],
    ) -> Manner:
        sources = Sources.of(layer.members, foreign=True)
        batch_dim = layer_batch_dim(layer.module)
        size = Size(num_examples, self._batch_dim if batch_dim is None else batch_dim, alike)
        return settle(self._subject(layer), args, kwargs, size, sources)

    def _subject(self, layer: Layer) -> Subject:
        places = places_of(layer)
        parameters = {place.name: self._parameters[place.name] for place in places}
        return Subject(
            layer, places, parameters, layer.inlined, False, self._serves, self._expanded, self._is_unruled
        )

    def _is_unruled(self, module: nn.Module) -> bool:
        return id(module) in self._without_rule or draws_masks(module)

    def _single(self, layer: Layer, num_leaves: int) -> Manner:
        """No examples, one call for all of them, or a batch of which nothing is known."""
        dims, sources = BatchDims((None,) * num_leaves, ()), Sources.of(layer.members, foreign=False)
        return Manner(False, None, dims, {}, (), places_of(layer), (), sources)

    # -- one forward ----------------------------------------------------------------------------------------

    def begin(
        self,
        layer: Layer,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hint: int | None,
        anchor: Tensor,
        *,
        now: bool,
    ) -> Begun:
        """Settle the manner (by a trial, if `now`), and keep what the forward may change."""
        manner, num_examples = self._manner(layer, args, kwargs, hint, now=now)
        leaves, _ = flatten((args, kwargs))
        kept = {i: x.detach().clone() for i in manner.mutated if isinstance(x := leaves[i], Tensor)}
        state = ModuleState.of(layer.members) if manner.stateful else None
        arrivals = Arrivals()
        opening = self._opening(layer, manner, arrivals, anchor) if manner.own else None
        return Begun(
            manner,
            num_examples,
            manner.sources.read(),
            state,
            tuple(copied(manner.changed)),
            kept,
            arrivals,
            opening,
        )

    def _opening(self, layer: Layer, manner: Manner, arrivals: Arrivals, anchor: Tensor) -> Opening:
        names = sorted(manner.names)
        marked = Mark.apply(arrivals, anchor, *(self._parameters[name].detach() for name in names))
        opened = frozenset(map(id, (layer.module, *manner.opened)))
        run = OwnRun(arrivals, manner.sources, opened, manner.copied)
        return Opening(manner.places, dict(zip(names, marked, strict=True)), opened, run)

    def ended(
        self, layer: Layer, begun: Begun, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: object
    ) -> Ran:
        """All that is needed to differentiate the forward."""
        manner, sources, num_examples = begun.manner, begun.manner.sources, begun.num_examples
        leaves, structure = flatten((args, kwargs))
        num_inputs = len(leaves)
        leaves = [begun.kept.get(i, x) for i, x in enumerate(leaves)]
        calls, given, after = (), [], sources.read()
        moved = not after.same(begun.before)
        if begun.opening is not None:
            run = begun.opening.run
            run.end()
            moved, calls, given = run.moved, tuple(run.calls), run.inputs
            leaves += run.leaves
            if not manner.knows(calls):
                manner = self._widened(layer, begun, calls, leaves, structure)
        moment = Moment(begun.before, after, moved, begun.state, begun.tensors)
        rerun = Rerun(
            layer.module, layer.members, places_of(layer), structure, num_inputs, calls, sources, moment
        )
        marks: list[Tensor | None] = []
        if manner.engine is not None:
            batch = Batch((), manner.dims_of(calls), num_examples, None)
            marks = marks_of([*floating_leaves(outputs), *given], batch.dims.outputs, batch)
        return Ran(
            Kept(manner, rerun, num_examples, tuple(marks)), leaves, begun.arrivals if manner.own else None
        )

    def _widened(
        self,
        layer: Layer,
        begun: Begun,
        calls: Sequence[ChildCall],
        leaves: Sequence[object],
        structure: Structure,
    ) -> Manner:
        """The manner of a forward that called children as no trial has seen, by a trial with the numbers that it drew."""
        manner, sources = begun.manner, begun.manner.sources
        with sources.preserved():
            sources.write(begun.before)
            args, kwargs = unflatten(leaves[: len(manner.dims.inputs)], structure)  # pyright: ignore
            found = self._settle(layer, args, kwargs, begun.num_examples, [manner.dims.inputs])
        if not found.own or not found.knows(calls):
            raise RuntimeError(
                f"expected module {layer.name or 'model'!r} to call its children as on the first batch; got others, which "
                "cannot be told apart from it; call the same children in every forward"
            )
        key = next((key for key, known in self._manners.items() if known is manner), None)
        manner = replace(manner, children={**found.children, **manner.children})
        if key is not None and begun.num_examples > 1:
            self._manners[key] = manner
        return manner

    # -- gradients --------------------------------------------------------------------------------------------

    def gradients(
        self, layer: Layer, kept: Kept, leaves: Sequence[object], grads: Sequence[Tensor | None]
    ) -> tuple[dict[str, SampleGrads], Tensor | None]:
        """Per-example gradients by the module's own parameter names, and whether the run was that of the forward."""
        manner = kept.manner
        refuse_shared(layer, manner, grads)
        parameters = {name: self._parameters[name] for name in manner.names}
        batch = Batch(leaves, manner.dims_of(kept.rerun.calls), kept.num_examples, None)
        try:
            found = generic(kept.rerun, manner.engine, batch, parameters, grads, kept.marks, manner.why)
        except (Unreplayable, Strayed) as error:
            raise _cannot_replay(layer, error) from error
        local = {name: local for local, name in reversed(layer.names.items())}
        return {local[name]: value for name, value in found.gradients.items()}, found.same


def refuse_otherwise(layer: Layer, same: Tensor | None) -> None:
    """Raise `MixesExamples` where examples alone gave something else than in the batch."""
    if same is not None and not bool(same):
        raise MixesExamples(
            f"expected module {layer.name or 'model'!r} ({type(layer.module).__name__}), which has no rule of its own, to "
            "give each example the output it gives that example alone; got another output in this batch, so it mixes "
            "examples where the batch tells it to; decide for each row by itself (torch.where)"
        )


def places_of(layer: Layer) -> tuple[Place, ...]:
    """Where the module and those below it keep their trainable parameters."""
    found = []
    for local, name in layer.names.items():
        path, _, key = local.rpartition(".")
        found.append(Place(layer.module.get_submodule(path), key, name))
    return tuple(found)


def _kind(value: object) -> object:
    return (value.dim(), value.dtype) if isinstance(value, Tensor) else type(value)


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
