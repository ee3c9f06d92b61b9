# SPDX-License-Identifier: Apache-2.0
"""The checks of the losses of one run, in their order: graph, constants, provenance.

Shapes: B examples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.hooks import RemovableHandle

from clipping.errors import MixesExamples
from clipping.loss_checks.batch import tensors
from clipping.loss_checks.graph import states
from clipping.loss_checks.loss_report import LossReport
from clipping.loss_checks.operations.arithmetic import as_count, scaled
from clipping.loss_checks.operations.layout import Layout
from clipping.loss_checks.operations.state import Alone, Facts, Rows, State, Total, Unproven, away
from clipping.loss_checks.provenance import Provenance
from clipping.loss_checks.trail import Inner, Trail, mark, trail
from clipping.loss_checks.verdict import Constants, Counted, refuse_changed, refuse_mixing, required
from clipping.modules.generic_rule import batch_dim_of
from clipping.recording.before_backward import ENTRANCE
from clipping.recording.tape import Tape
from clipping.recording.torch_compile import untraced

_KEPT = 1024


class LossChecks:
    """Looks at every backward of a run before it begins; see the package for what is checked and what cannot be.

    `mean` says that losses are means, `whole` that every batch is the whole dataset. `ready` tells whether a backward now
    would count: a step is open, and nothing probes. Attaching registers hooks on the model and wraps torch's way into its engine; `detach` takes both away.
    """

    def __init__(self, tape: Tape, *, mean: bool, whole: bool = False, ready: Callable[[], bool]) -> None:
        self._tape = tape
        self._mean = mean
        self._whole = whole
        self._ready = ready
        self._constants = Constants()
        self._counted = Counted()
        self._provenance = Provenance()
        self._passed: dict[Hashable, tuple[tuple[int, str, float], ...]] = {}
        self._flags: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []
        self._follower: RemovableHandle | None = None
        self._proven: list[bool] = []
        self._order: bytes | None = None
        self._given = False
        self._following = False
        self._due = 1
        self._num_draws = self._num_followed = 0
        self._number = 0
        self._num_backwards = {True: 0, False: 0}

    # -- the run ------------------------------------------------------------------------------------------

    def attach(self) -> LossChecks:
        """Begin to look."""
        self._hooks.append(
            self._tape.model.register_forward_hook(untraced(self._after_model), always_call=True)
        )
        earlier = untraced(self._refuse_earlier)
        self._hooks.append(self._tape.model.register_forward_pre_hook(earlier, with_kwargs=True))
        ENTRANCE.enter(self)
        return self

    def detach(self) -> None:
        """Look no more."""
        self._stop_following()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        ENTRANCE.leave(self)

    def __deepcopy__(self, memo: dict[int, object]) -> LossChecks:
        """Itself: a copied model is an ordinary model, whose copied hooks find nothing to look at."""
        return self

    @property
    def report(self) -> LossReport:
        """What was checked so far."""
        shown, given = self._num_backwards[False], self._num_backwards[True]
        return LossReport(shown, given, self._num_followed, self._num_draws)

    def hand_out(self, batch: object, num_examples: int, *, first: bool) -> None:
        """A part of a drawn batch goes to the loop: follow it where that is due."""
        self._stop_following()
        self._order, self._number = None, 0
        if first:
            self._num_draws += 1
            self._following = False
        if (self._following or self._num_draws >= self._due) and num_examples > 1 and _can_follow():
            if not self._following:
                self._following, self._due = True, 2 * self._num_draws
                self._num_followed += 1
            self._provenance.start(batch, num_examples, self._tape.batch_dim)
            before = untraced(self._before_model)
            self._follower = self._tape.model.register_forward_pre_hook(before, with_kwargs=True)
        else:
            self._provenance.pass_by(batch)

    def _stop_following(self) -> None:
        if self._provenance.entered:
            self._provenance.stop()
        if self._follower is not None:
            self._follower.remove()
            self._follower = None

    def settle(self) -> None:
        """The step is about to be released: ask what was put off, so as not to stop a device in the backward."""
        self._stop_following()
        if self._flags:
            flags, self._flags = self._flags, []
            if bool(torch.stack(flags).any()):
                refuse_changed()

    def discard(self) -> None:
        """What was collected is dropped, and with it what was put off."""
        self._flags.clear()
        self._number = 0

    @contextmanager
    def given(self, losses: Tensor | None = None) -> Iterator[None]:
        """A block whose backward is of `losses` (B,): numbers in them may change, and unknown operations are trusted."""
        if losses is not None and self._provenance.on:
            _refuse_seen(self._provenance.seen.of(losses), refuse_mixing)
        self._given = True
        try:
            yield
        finally:
            self._given = False

    # -- the model ----------------------------------------------------------------------------------------

    def _refuse_earlier(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tape, seen = self._tape, self._provenance.seen
        counts = torch.is_grad_enabled() and not tape.is_paused and not tape.is_rerunning
        if counts and model is tape.model and any(map(seen.is_earlier, tensors((args, kwargs)))):
            _refuse_input(Unproven("a tensor of an earlier batch", shown=True))

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._provenance.on or model is not self._tape.model or self._tape.is_rerunning:
            return
        self._order = None
        given = [(x, self._provenance.seen.of(x)) for x in tensors((args, kwargs))]
        if torch.is_grad_enabled() and not self._provenance.listed:
            self._refuse_copies(given)
        for _, found in given:
            if isinstance(found, Rows):
                self._order = found.layout.order
            elif torch.is_grad_enabled():
                _refuse_seen(found, _refuse_input)
        self._provenance.enter_model()

    def _refuse_copies(self, given: Sequence[tuple[Tensor, State]]) -> None:
        """Raise MixesExamples where some examples only are there for all: as rows of the batch, or beside them."""
        num_examples, dim = self._provenance.facts.num_examples, self._tape.batch_dim
        alone = [(x, state.factors) for x, state in given if isinstance(state, Alone)]
        few = 0 < len({i for _, examples in alone for i in examples}) < num_examples
        if few and (
            any(isinstance(state, Rows) for _, state in given)
            or (len(given) == 1 and all(x.dim() > dim and x.shape[dim] == num_examples for x, _ in alone))
        ):
            _refuse_input(Unproven("copies of a single example for the others", shown=True))

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], outputs: object) -> None:
        if model is not self._tape.model or self._tape.is_rerunning:
            return
        num_examples = self._tape.num_examples_seen
        if not torch.is_grad_enabled() or self._tape.is_aside:  # of which the tape takes no notice
            num_examples = self._provenance.facts.num_examples if self._provenance.on else None
        if num_examples:
            found = (outputs,) if isinstance(outputs, Tensor) else tuple(tensors(outputs))
            dims = [batch_dim_of(x, num_examples, self._tape.batch_dim) for x in found]
            listed = isinstance(outputs, list | tuple) and len(outputs) == num_examples  # of one each, maybe
            layouts = [None if dim is None or listed else Layout(dim, order=self._order) for dim in dims]
            mark(found, layouts, num_examples, id(self._tape))
            if self._provenance.on:
                self._note_outputs(found, layouts, num_examples)
        if self._provenance.on:
            self._provenance.leave_model()

    def _note_outputs(
        self, outputs: Sequence[Tensor], layouts: Sequence[Layout | None], num_examples: int
    ) -> None:
        same = num_examples == self._provenance.facts.num_examples
        for output, layout in zip(outputs, layouts, strict=True):
            self._provenance.seen.put(output, Rows(layout) if same and layout is not None else None)

    # -- backwards ----------------------------------------------------------------------------------------

    def before(self, roots: Sequence[Any], grads: Sequence[Any], second_order: bool) -> None:
        """Show that a backward of `roots` is of a sum over examples, or raise."""
        self._proven.append(False)
        tape = self._tape
        asking = tape.attribution.asking or tape.is_rerunning
        if second_order or tape.is_paused or asking or not self._ready():
            return
        if torch._C._len_torch_dispatch_stack():
            # A mode that the loop is in, ours too, would see the numbers that are read here, and trip over them.
            with _disable_current_modes():
                self._proven[-1] = self._look(roots, grads)
        else:
            self._proven[-1] = self._look(roots, grads)

    def after(self) -> None:
        """That backward is over."""
        self._proven.pop()

    def made(self, roots: Sequence[Any], inputs: Sequence[Any], grads: Sequence[Tensor | None]) -> None:
        """It has made gradients: note how they depend on the examples, should the loop put them into a loss."""
        if (
            self._provenance.on
            and self._ready()
            and not self._tape.is_rerunning
            and not self._tape.attribution.asking
        ):
            self._provenance.note_gradients(roots, inputs, grads)

    def require_proven(self) -> None:
        """Raise RuntimeError inside a backward that was not looked at."""
        if not (self._proven and self._proven[-1]):
            raise RuntimeError(
                "expected a backward that begins with loss.backward() or torch.autograd.backward; got one that went past "
                "them, so that the loss could not be looked at; call loss.backward()"
            )

    def _look(self, roots: Sequence[Any], grads: Sequence[Any]) -> bool:
        return any([self._look_at(*pair) for pair in zip(roots, grads, strict=True)])

    def _look_at(self, root: Any, grad: Any) -> bool:
        """Look at one root; False where it is of another model, or cannot be read, which is for torch to tell."""
        node, number = (root.grad_fn if isinstance(root, Tensor) else root.node), root.output_nr
        if node is None:
            return False
        try:
            found = trail(node, self._tape.batch_dim, self._order)
        except RuntimeError:  # its saved tensors are gone: torch says so in its own words
            return False
        known = isinstance(grad, Tensor) and grad.numel() == 1 and grad.device.type == "cpu"
        start = grad.item() if known else grad
        key = (found.steps, start, self._given)
        again = None if self._provenance.on or isinstance(start, Tensor) else self._passed.get(key)
        if again is None or not all([self._holds(found, *what) for what in again]):
            return self._prove(found, number, grad, key)
        self._num_backwards[self._given] += 1
        self._number += 1
        return True

    def _holds(self, found: Trail, position: int, attribute: str, expected: float) -> bool:
        value = getattr(found.nodes[position], attribute)
        if away(value):
            self._flags.append((value != expected).any())
            return True
        return value.item() == expected

    def _prove(self, found: Trail, number: int, grad: Any, key: tuple[Hashable, ...]) -> bool:
        owner = id(self._tape)
        if not any(place.owner == owner for s in found.steps if not isinstance(s, Inner) for place in s):
            return False
        following = self._provenance.on
        facts = Facts(mean=self._mean, read=self._provenance.read)
        lookup = self._provenance.made if following else None
        if following and isinstance(grad, Tensor):
            _refuse_seen(self._provenance.seen.of(grad), refuse_mixing)
        state = states(found, facts, lookup)[-1][number]
        if facts.num_examples:
            self._judge(facts, _started(facts, state, grad))
        if facts.repeatable and not following and not isinstance(key[1], Tensor):
            if len(self._passed) >= _KEPT:
                self._passed.clear()
            whole = trail(
                found.nodes[-1], self._tape.batch_dim, self._order
            )  # with all that was asked for by now
            self._passed[(whole.steps, *key[1:])] = tuple(facts.again)
        return True

    def _judge(self, facts: Facts, state: State) -> None:
        self._num_backwards[self._given] += 1
        self._number += 1
        if facts.num_examples == 1 and (facts.unclear or isinstance(state, Rows | Unproven)):
            return  # nothing to keep apart
        if self._given and isinstance(state, Unproven) and not state.shown:
            return
        total = required(facts, state)
        if self._given and self._provenance.on:
            self._counted.require(facts, total, self._provenance.counted)
        if facts.sized and self._whole and not self._given:
            what = "a mean that is divided by the number of examples once more"
            refuse_mixing(Unproven(what, shown=False))
        if not self._given:
            self._constants.require(self._number, facts, total)
        self._flags += facts.flags


def _started(facts: Facts, state: State, grad: Any) -> State:
    """The state of a root, times the gradient that the backward starts with."""
    if not isinstance(grad, Tensor) or isinstance(state, Unproven | None):
        return state
    if grad.numel() == 1 and away(grad):
        facts.tensors.append(grad.detach())
        facts.repeatable = False
        return state
    if grad.numel() > 1 and not bool((grad == grad.flatten()[0]).all()):
        return Unproven(
            "a gradient other than the same number for all losses, given to backward()", shown=False
        )
    state = scaled(state, as_count(facts, state, float(grad.flatten()[0])))
    return Total((state.factor,)) if isinstance(state, Rows) else state


def _refuse_seen(found: State, refuse: Callable[[Unproven], None]) -> None:
    if isinstance(found, Total):
        refuse(Unproven("a sum over the examples of the batch", shown=True))
    elif isinstance(found, Unproven) and found.shown:
        refuse(found)


def _refuse_input(found: Unproven) -> None:
    raise MixesExamples(
        f"expected inputs of the model that are each made from one example; got {found.reason}, after which an input "
        "depends on several; do it with public numbers (means known before, other images), or to each example alone"
    )


def _can_follow() -> bool:
    """Whether torch.compile leaves a mode that follows operations alone, or is not in use."""
    return hasattr(TorchDispatchMode, "ignore_compile_internals") or "torch._dynamo" not in sys.modules
