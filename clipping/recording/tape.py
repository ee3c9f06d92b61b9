# SPDX-License-Identifier: Apache-2.0
"""The tape: records (layer, input, output gradient) during an ordinary backward that forms no weight gradient.

Each recorded layer runs its forward with *detached* parameters and its outputs pass through a `Tap`, an
identity whose backward hands (inputs, output gradient) to the layer's rule. Autograd therefore never forms a
weight gradient, activations are saved through autograd (so checkpointing and offloading hold), and a hook on
each parameter refuses any gradient that takes another way. A parameter goes to the backward's collector as
soon as no call that is left can add to it (`clipping.recording.deliveries`).

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from clipping.collectors.collector import Begin
from clipping.errors import UnrecordedParameter
from clipping.modules.detached_forward import Frames
from clipping.modules.generic_rule import BatchDims
from clipping.modules.heard_calls import Ear
from clipping.modules.layers import Layer, entries, recorded_layers
from clipping.modules.replay import Origin, Turns
from clipping.modules.unruled_calls import Begun, Ran, Unruled
from clipping.recording.call_checks import (
    refuse_opaque,
    refuse_packed,
    sees_the_batch,
)
from clipping.recording.deliveries import TENSOR, Deliveries
from clipping.recording.folded_positions import Folds
from clipping.recording.row_attribution import Attribution, rows_of
from clipping.recording.row_graph import losses_below
from clipping.recording.tap import Autocast, Call, Point, Refusal, refuse_taped, tapped
from clipping.recording.torch_compile import HOOK_GUARDS, untraced
from clipping.reruns.nested_values import Structure, flatten, unflatten
from clipping.rules.dropouts import draws_masks, layer_batch_dim
from clipping.rules.packed_sequences import packed_input
from clipping.rules.registry import Inputs
from clipping.shared_values.example_free import Constants
from clipping.shared_values.first_meetings import Meeting
from clipping.shared_values.followed_forward import Home
from clipping.shared_values.shared_values import Shares


class _Returned(NamedTuple):
    """What a call returned: the leaves, how they are put together (None: one tensor), and the floating-point ones.

    `dims` tells where the batch is in these, None: where it is in all tensors.
    """

    leaves: Sequence[object]
    structure: Structure | None
    floating: list[Tensor]
    dims: BatchDims | None

    def with_floating(self, floating: Sequence[Tensor]) -> object:
        """The outputs with others in the place of the floating-point ones."""
        if self.structure is None:
            return floating[0]
        supply = iter(floating)
        return unflatten([next(supply) if _is_floating(x) else x for x in self.leaves], self.structure)


class Tape:
    """Records per-example gradients of every trainable parameter of `model` while it is attached.

    `begin` makes the collector of each backward. `batch_dim` is the dimension of the
    batch in the tensors that layers see (0, or 1 for sequence-first models). `mean` says that backwards start from the
    mean of the losses. Attaching registers module and
    parameter hooks only; `detach` removes all of them, and nothing else is ever left on the model.

    Guarantees
    ----------
    While attached, no `.grad` of a trainable parameter is written by autograd: a parameter used outside its
    recorded layer raises `UnrecordedParameter` before its gradient is stored
    (test_guarantee_autograd_never_writes_a_gradient).
    """

    num_examples_seen: int | None = None
    """The size of the batch that the model was called with last, None where it took no tensor."""
    is_paused: bool = False
    """Whether calls are not recorded now: in `paused`, or in `set_aside`."""
    is_aside: bool = False
    """Whether the model runs as if no tape were there."""
    is_rerunning: bool = False
    """Whether a module without a rule runs again now, which is no use of it."""

    def __init__(self, model: nn.Module, begin: Begin, *, batch_dim: int = 0, mean: bool = False) -> None:
        self.model = model
        self.batch_dim = batch_dim
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        self.layers = recorded_layers(model)
        self._calls: dict[str, WeakSet[Point]] = {name: WeakSet() for name in self.parameters}
        self._by_module = {id(layer.module): layer for layer in self.layers}
        self._may_draw = {id(x.module) for x in self.layers if layer_batch_dim(x.module) is not None}
        self._anchor = torch.zeros((), requires_grad=True, device="cpu")
        self._hooks: list[RemovableHandle] = []
        self._frames = Frames()
        self._unruled = Unruled(self.layers, self.parameters, batch_dim, self._serves, self._expanded_child)
        self.attribution = Attribution(self._anchor)
        self.turns = Turns()
        self.deliveries = Deliveries(
            self, begin, self._calls, self.attribution, self.turns, self._unruled, self._again, mean=mean
        )
        known = {id(p): name for name, p in self.parameters.items()}
        take, valve = self.deliveries.arrive, self.deliveries.valve
        self._shares = Shares(Home(known, Constants(model), self._anchor, self._register, take, set(), valve))
        self._children: set[int] = set()
        self._folds = Folds(self.layers, batch_dim)
        self._root_dims = 0
        self._entries = entries(model, self.layers)
        self._entry: nn.Module | None = None
        self._ear: Ear | None = None
        self._origin: Origin | None = None

    def attach(self) -> Tape:
        """Register the hooks."""
        if self._hooks:
            raise RuntimeError("expected a detached tape; got one already attached; detach it first")
        refuse_taped(self.parameters)
        before, after, note = untraced(self._before), untraced(self._after), untraced(self._note)
        root, left = untraced(self._before_root), untraced(self._after_root)
        for block in self._folds.blocks:
            self._hooks.append(block.register_forward_pre_hook(note, with_kwargs=True))
        for layer in self.layers:
            module = layer.module
            # First, where the module runs again with its other hooks, which may set what they make of parameters.
            first = layer.rule is None
            self._hooks.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=first))
            self._hooks.append(
                module.register_forward_hook(after, with_kwargs=True, always_call=True, prepend=True)
            )
        for module in self._entries:
            self._hooks.append(module.register_forward_pre_hook(root, with_kwargs=True, prepend=True))
            self._hooks.append(module.register_forward_hook(left, always_call=True))
        for name, parameter in self.parameters.items():
            self._hooks.append(parameter.register_hook(Refusal(name, lambda: not self.is_aside)))
        HOOK_GUARDS.enter()
        return self

    def detach(self) -> None:
        """Remove every hook, and put back the parameters that an interrupted forward left detached."""
        if self._hooks:
            HOOK_GUARDS.leave()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._children.clear()
        self._frames.unwind()
        self._shares.unwind()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the model on its parameters as constants: gradients reach its inputs, and nothing is recorded."""
        self._require_recording()
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Run the model as if no tape were there: nothing is recorded, and autograd writes its parameters' gradients."""
        self._require_recording()
        self.is_paused = self.is_aside = True
        try:
            yield
        finally:
            self.is_paused = self.is_aside = False

    def _require_recording(self) -> None:
        if self.is_paused:
            raise RuntimeError("expected a tape that records; got one paused already; leave that block first")

    @property
    def anchor(self) -> Tensor:
        """Stands for all parameters in `backward(inputs=...)`, which otherwise records nothing."""
        return self._anchor

    @property
    def in_forward(self) -> bool:
        """Whether code of the model runs now, or is run again."""
        return self._entry is not None or self.is_rerunning or len(self._frames) > 0

    def doubt(self) -> None:
        """Look again at what serves all examples, whose the rows are, and whether modules keep examples apart."""
        self._shares.doubt()
        self.attribution.doubt()
        self._unruled.doubt()

    @property
    def is_asking(self) -> bool:
        """Whether a backward runs that only asks whose rows are; it delivers nothing."""
        return self.attribution.asking

    def attribute(self, gates: Sequence[Any], num_examples: int) -> None:
        """Find out whose the rows of layers are, where they are not the examples; see `clipping.recording.row_attribution`.

        `gates` are tensors, or edges of the graph, with the examples in dimension 0: the losses (B,).
        """
        if self.batch_dim == 0 and not self.is_paused:
            self.attribution.attribute(gates, num_examples, self.turns.turn)

    def attribute_below(self, roots: Sequence[Any], num_examples: int) -> None:
        """`attribute`, where a backward of `roots` begins and the losses are those that it is the mean or sum of."""
        if self.attribution.asking or not self.attribution.is_open(num_examples, self.turns.turn):
            return
        losses = losses_below(roots, num_examples)
        if losses is not None or num_examples == 1:
            self.attribute(roots if losses is None else [losses], num_examples)

    def __enter__(self) -> Tape:
        """Attach."""
        return self.attach()

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    def __deepcopy__(self, memo: dict[int, object]) -> Tape:
        """The tape itself: a copied model is an ordinary model, whose copied hooks find nothing to record."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refused: a saved tape would hold un-noised sums."""
        raise TypeError(
            "expected a detached model to pickle; got one under a tape, which holds private sums; save "
            "model.state_dict(), or detach the tape first"
        )

    # -- forward ----------------------------------------------------------------------------------------

    def _before_root(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        name = self._entries.get(module)
        if name is None or self.is_rerunning or self.is_aside or not torch.is_grad_enabled():
            return  # none of ours: a copy of the model, say
        recomputed = torch._C._current_graph_task_id() != -1  # a checkpoint in the middle of a backward
        if module is not self.model and (recomputed or self._entry not in (None, module)):
            return
        thawed = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        if thawed:
            raise UnrecordedParameter(
                f"expected parameters to stay frozen while the tape is attached; got {thawed[:4]} trainable, whose "
                "gradients nothing would clip; unfreeze them before making the model private"
            )
        self._frames.unwind()
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 0]
        first = tensors[0] if tensors else None
        dim = self.batch_dim if first is not None and first.dim() > self.batch_dim else 0
        self.num_examples_seen = None if first is None else first.shape[dim]
        self._root_dims = 0 if first is None else first.dim()
        self._entry = module
        self._origin = Origin(self.turns.turn)
        if self.num_examples_seen is not None and self.batch_dim == 0 and not self.is_paused:
            self._shares.begin(name, self.num_examples_seen, tensors, self._origin)

    def _register(self, meeting: Meeting) -> None:
        self.attribution.note(meeting, meeting.place.rows)
        for name in meeting.names:
            self._calls[name].add(meeting)

    def _after_root(self, module: nn.Module, args: tuple[object, ...], outputs: object) -> None:
        if module is self._entry and not self.is_rerunning:
            self._entry = self._origin = None
            self._shares.end()

    def _note(self, block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not self.is_aside:
            self._folds.note(block, args, kwargs)

    def _before(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        layer = self._by_module.get(id(module))
        if layer is None or layer.module is not module:  # a copy of the model
            return None
        if id(module) in self._may_draw and draws_masks(module):
            layer = layer._replace(rule=None)
        if self.is_rerunning or layer.rule is None:  # else it is asked where the call begins
            self._frames.require_one_thread()
        if self.is_rerunning:
            return None
        recording = torch.is_grad_enabled() and not self.is_aside
        opening, begun = None, None
        if recording and layer.rule is None and not self.is_paused and not self._frames.explained(module):
            with self._shares.unfollowed():
                begun = self._begun(layer, args, kwargs)
            opening = begun.opening
        with torch._C.DisableTorchFunction():  # what the tape does is no part of the forward that is followed
            if not self._frames.begin(layer, recording, self.parameters, opening, begun) or self.is_paused:
                return None
            # Only where a module without a rule has handed calls to its children can this be one.
            if layer.rule is not None and self._children and self._frames.own_run is not None:
                return self._expanded(layer, args, kwargs)
        if opening is None and self._shares.forward is not None:
            self._shares.detached(layer)
        return None

    def _begun(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Begun:
        in_backward = torch._C._current_graph_task_id() != -1
        hint = self.num_examples_seen if self._entry is not None or in_backward else None
        with self._frames.occupied(layer), self._again():
            begun = self._unruled.begin(layer, args, kwargs, hint, self._anchor, now=not in_backward)
        for child in begun.manner.called:
            if id(child) not in self._children:
                self._children.add(id(child))
                enter, leave = untraced(self._enter_child), untraced(self._leave_child)
                self._hooks.append(child.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
                self._hooks.append(child.register_forward_hook(leave, always_call=True))
        return begun

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Runs a module again: that is no use of it."""
        known, self.is_rerunning = self.is_rerunning, True
        try:
            yield
        finally:
            self.is_rerunning = known

    @contextmanager
    def heard(self, ear: Ear) -> Iterator[None]:
        """Let `ear` hear the calls of recorded layers, which are recorded no further."""
        known, self._ear = self._ear, ear
        try:
            with self._again():
                yield
        finally:
            self._ear = known

    def _enter_child(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        run = self._frames.own_run if id(module) in self._children and not self.is_rerunning else None
        return None if run is None else run.enter(module, args, kwargs)

    def _leave_child(self, module: nn.Module, args: tuple[object, ...], outputs: object) -> None:
        run = self._frames.own_run if id(module) in self._children and not self.is_rerunning else None
        if run is not None:
            run.leave(module, outputs)

    def _expanded_child(
        self, module: nn.Module, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        layer = self._by_module.get(id(module))
        return None if layer is None else self._expanded(layer, args, kwargs)

    def _serves(self, module: nn.Module, args: Any, kwargs: Any, outputs: object) -> bool:
        """Whether a recorded layer below a module without a rule can be left to its own rule."""
        layer = self._by_module.get(id(module))
        hint = self.num_examples_seen if self._entry is not None else None
        return layer is None or sees_the_batch(layer, Inputs(args, kwargs), outputs, self.batch_dim, hint)

    def _expanded(
        self, layer: Layer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        # Position ids of shape (1, T) stand for every example: expanded, their gradient arrives per example.
        if layer.rule is None or not isinstance(layer.module, nn.Embedding):
            return None
        # Outside the model's own forward nothing is known of the batch, but for recomputed checkpoints.
        known = self._entry is not None or torch._C._current_graph_task_id() != -1
        hint, dim = self.num_examples_seen if known else None, self.batch_dim
        leaves, spec = pytree.tree_flatten((args, kwargs))
        first = Inputs(args, kwargs).first
        if hint is None or first.dim() < 2 or first.shape[dim] != 1:
            return None
        size = [-1] * first.dim()
        size[dim] = hint
        return pytree.tree_unflatten([first.expand(size) if x is first else x for x in leaves], spec)

    def _after(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], outputs: object
    ) -> object:
        if self._ear is not None and self.is_rerunning:
            layer = self._by_module.get(id(module))
            if layer is None or layer.module is not module or outputs is None:
                return None
            return self._ear(layer, args, kwargs, outputs)
        with torch._C.DisableTorchFunction():
            ended = None if self.is_rerunning else self._frames.end(module)
        if ended is None or outputs is None or self.is_paused:
            return None
        ran = None
        if isinstance(ended.begun, Begun):
            with self._again(), self._shares.unfollowed():
                ran = self._unruled.ended(ended.layer, ended.begun, args, kwargs, outputs)
        with torch._C.DisableTorchFunction():
            return self._tapped(ended.layer, Inputs(args, kwargs), outputs, ran)

    def _returned(
        self, layer: Layer, inputs: Inputs, outputs: object, handed_out: Sequence[object], plain: bool
    ) -> _Returned:
        if plain:
            leaves, structure = [outputs], None
        else:
            refuse_packed(layer, inputs)
            leaves, structure = flatten(outputs)
        floating = [x for x in leaves if isinstance(x, Tensor) and _is_floating(x)]
        detached, dims = [x.detach() for x in floating], None
        if layer.rule is not None and layer.rule.batch_dims is not None:
            dims = BatchDims((), layer.rule.batch_dims(layer.module, inputs, detached))
        if not plain:
            refuse_opaque(layer, leaves, handed_out)
        return _Returned(leaves, structure, floating, dims)

    def _tapped(self, layer: Layer, inputs: Inputs, outputs: object, ran: Ran | None) -> object:
        # One tensor in, one out: nothing to take apart.
        plain = ran is None and type(outputs) is Tensor and _is_plain(inputs)
        returned = self._returned(layer, inputs, outputs, () if ran is None else ran.handed_out, plain)
        if not returned.floating:
            return None
        in_backward = torch._C._current_graph_task_id() != -1
        autocast = _autocast(returned.floating[0].device.type)
        shared = None
        # The module's own parameters are followed by autograd, or a trial has shown one row for each example.
        if ran is None or (
            ran.wait is None and self.num_examples_seen != 1 and not ran.kept.manner.is_batched
        ):
            shared = self._shares.handed_out(layer, inputs, returned.floating, autocast, in_backward)
        if isinstance(shared, list):
            return returned.with_floating(shared)
        in_leaves, in_structure = (
            ([inputs.args[0]], None) if plain else flatten((inputs.args, dict(inputs.kwargs)))
        )
        spread, floating = None, returned.floating
        if shared is not None:
            spread, floating, ran = floating[0].shape, [shared], None
        elif ran is not None:
            layer, in_leaves = ran.kept.recorded(layer), ran.leaves
        call = Call(
            self.deliveries.deliver,
            layer,
            in_structure,
            tuple(TENSOR if isinstance(x, Tensor) else x for x in in_leaves),
            returned.dims,
            autocast,
            in_backward,
            None if layer.fold is None else self._folds.of(layer, returned.floating),
            self._origin or Origin(self.turns.turn),
            ran and ran.kept,
            spread,
        )
        if not in_backward:  # a recomputed checkpoint runs layers again, in a graph that no backward visits
            for name in set(call.layer.names.values()):
                self._calls[name].add(call)
        if plain or packed_input(inputs) is None:  # the rows of packed outputs are positions, by length
            self.attribution.note(call, rows_of(call, floating, self.batch_dim))
        wait = None if ran is None else ran.wait
        outputs = tapped(call if wait is None else wait.of(call), self._anchor, floating, in_leaves)
        return outputs[0] if plain else returned.with_floating(outputs)


def _is_plain(inputs: Inputs) -> bool:
    """Whether a call has one argument, a tensor."""
    return len(inputs.args) == 1 and not inputs.kwargs and type(inputs.args[0]) is Tensor


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _autocast(device_type: str) -> Autocast:
    """The mixed precision in force now."""
    return Autocast(
        device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    )
