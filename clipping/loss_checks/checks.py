# SPDX-License-Identifier: Apache-2.0
"""The checks of the losses of one run, in their order: graph, constants, provenance.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.hooks import RemovableHandle

from clipping.compiled import untraced
from clipping.errors import MixesExamples
from clipping.loss_checks.arithmetic import as_count, scaled
from clipping.loss_checks.entrance import ENTRANCE
from clipping.loss_checks.graph import Walk, mark
from clipping.loss_checks.layout import Layout
from clipping.loss_checks.provenance import Provenance
from clipping.loss_checks.state import Facts, Rows, State, Total, Unproven
from clipping.loss_checks.verdict import Constants, refuse_mixing, required
from clipping.rules.generic import batch_dim_of
from clipping.tape import Tape


@dataclass(frozen=True, slots=True)
class LossReport:
    """Which checks the losses of a run have passed.

    `num_backwards` were shown by their graph to be a mean (or sum) over examples; of `num_trusted` it was only seen
    that nothing brings examples together: their losses came one for each example, to `backward(losses)`. In
    `num_followed` draws the batch was followed from the loader to the loss.
    """

    num_backwards: int
    num_trusted: int
    num_followed: int

    def __str__(self) -> str:
        return (
            f"losses: {self.num_backwards} backwards shown by their graph to be a sum over examples, {self.num_trusted} of "
            f"one loss for each example in which nothing brings examples together; batches followed from the loader to "
            f"the loss at {self.num_followed} draws"
        )


class LossChecks:
    """Looks at every backward of a run before it begins; see the package for what is checked and what cannot be.

    `mean` says that losses are means, `whole` that every batch is the whole dataset. `ready` tells whether a backward now would count: a step is open, and nothing
    probes. Attaching registers hooks on the model and wraps torch's way into its engine; `detach` takes both away.
    """

    def __init__(self, tape: Tape, *, mean: bool, whole: bool = False, ready: Callable[[], bool]) -> None:
        self._tape = tape
        self._mean = mean
        self._whole = whole
        self._ready = ready
        self._constants = Constants()
        self._provenance = Provenance()
        self._flags: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []
        self._proven: list[bool] = []
        self._order: bytes | None = None
        self._trusting = False
        self._draws = 0
        self._followed = 0
        self._counts = [0, 0]

    # -- the run ------------------------------------------------------------------------------------------

    def attach(self) -> LossChecks:
        """Begin to look."""
        before, after = untraced(self._before_model), untraced(self._after_model)
        model = self._tape.model
        self._hooks.append(model.register_forward_pre_hook(before, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(after, always_call=True))
        ENTRANCE.enter(self)
        return self

    def detach(self) -> None:
        """Look no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        ENTRANCE.leave(self)
        self._provenance.stop()

    @property
    def report(self) -> LossReport:
        """What was checked so far."""
        return LossReport(self._counts[0], self._counts[1], self._followed)

    def hand_out(self, batch: object, num_examples: int, *, first: bool) -> None:
        """A part of a drawn batch goes to the loop: follow it where that is due."""
        self._draws += first
        self._provenance.stop()
        self._order = None
        if num_examples > 1 and self._draws & (self._draws - 1) == 0 and _can_follow():
            self._followed += first
            self._provenance.start(batch, num_examples, self._tape.batch_dim)

    def settle(self) -> None:
        """The step is about to be released: ask what was put off, so as not to stop a device."""
        self._provenance.stop()
        flags, self._flags = self._flags, []
        if any(bool(flag) for flag in flags):
            refuse_mixing(
                Unproven("a mean over the labels that are not ignored in the whole batch", shown=True)
            )
        self._constants.settle()

    def discard(self) -> None:
        """What was collected is dropped, and with it what was put off."""
        self._flags.clear()

    @contextmanager
    def trusting(self, losses: Tensor | None = None) -> Iterator[None]:
        """A block whose backward is of `losses` (B,): numbers in them may change, and unknown operations are trusted."""
        if losses is not None and self._provenance.on:
            found = self._provenance.seen.of(losses)
            if isinstance(found, Unproven) and found.shown:
                refuse_mixing(found)
        self._trusting = True
        try:
            yield
        finally:
            self._trusting = False

    # -- the model ----------------------------------------------------------------------------------------

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._tape.model or not self._provenance.on:
            return
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                found = self._provenance.seen.of(leaf)
                if isinstance(found, Rows):
                    self._order = found.layout.order
                elif isinstance(found, Unproven) and found.shown and torch.is_grad_enabled():
                    raise MixesExamples(
                        f"expected inputs of the model that are each made from one example; got {found.reason}, after "
                        "which an input depends on several; do it with public numbers (another mean, "
                        "another image), or to each example alone"
                    )
        self._provenance.enter_model()

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], outputs: object) -> None:
        if model is not self._tape.model:
            return
        num_examples = self._tape.num_examples_seen
        leaves = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
        if num_examples:
            dims = [batch_dim_of(x, num_examples, self._tape.batch_dim) for x in leaves]
            mark(leaves, dims, num_examples, id(self._tape))
            if self._provenance.on:
                for leaf, dim in zip(leaves, dims, strict=True):
                    known = dim is not None and num_examples == self._provenance.facts.num_examples
                    self._provenance.seen.put(leaf, Rows(Layout(dim, order=self._order)) if known else None)
        if self._provenance.on:
            self._provenance.leave_model()

    # -- backwards ----------------------------------------------------------------------------------------

    def before(self, roots: Sequence[Any], grads: Sequence[Any], second_order: bool) -> None:
        """Show that a backward of `roots` is of a sum over examples, or raise."""
        self._proven.append(False)
        if second_order or self._tape.is_paused or not self._ready():
            return
        # A mode that the loop is in, ours too, would see the numbers that are read here, and trip over them.
        with _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext():
            self._look(roots, grads)

    def _look(self, roots: Sequence[Any], grads: Sequence[Any]) -> None:
        facts = Facts(mean=self._mean, read=self._provenance.read)
        lookup = self._provenance.made if self._provenance.on else None
        walk = Walk(facts, self._tape.batch_dim, lookup, self._order)
        states = [_rooted(walk, root, grad) for root, grad in zip(roots, grads, strict=True)]
        if id(self._tape) not in walk.met:
            return
        if facts.num_examples:
            self._judge(walk, facts, states)
        self._proven[-1] = True

    def after(self) -> None:
        """That backward is over."""
        self._proven.pop()

    def require_proven(self) -> None:
        """Raise RuntimeError inside a backward that was not looked at."""
        if not (self._proven and self._proven[-1]):
            raise RuntimeError(
                "expected a backward that begins with loss.backward() or torch.autograd.backward; got one that went past "
                "them, so that the loss could not be looked at; call loss.backward()"
            )

    def _judge(self, walk: Walk, facts: Facts, states: Sequence[State]) -> None:
        found = Total(())
        for state in states:
            alone = facts.num_examples == 1 and isinstance(state, Rows | Unproven)  # nothing to keep apart
            if alone or (self._trusting and isinstance(state, Unproven) and not state.shown):
                facts.unclear = True
                continue
            found = Total(found.factors + required(facts, state).factors)
        if facts.sized and self._whole and not self._trusting:
            refuse_mixing(Unproven("a mean that is divided by the number of examples once more", shown=False))
        self._flags += facts.flags
        self._counts[self._trusting] += 1
        if not self._trusting and not facts.unclear:
            self._constants.require(walk.names, facts, found)


def _rooted(walk: Walk, root: Any, grad: Any) -> State:
    """The state of one root, times the gradient that the backward starts with."""
    node, number = (root.grad_fn, root.output_nr) if isinstance(root, Tensor) else (root.node, root.output_nr)
    if node is None:
        return None
    state = walk.state(node, number)
    if not isinstance(grad, Tensor) or isinstance(state, Unproven | None):
        return state
    facts = walk.facts
    if grad.numel() == 1 and grad.device.type != "cpu":
        facts.tensors.append(grad.detach())
        return state
    if grad.numel() > 1 and not bool((grad == grad.flatten()[0]).all()):
        return Unproven(
            "a gradient other than the same number for all losses, given to backward()", shown=False
        )
    if not grad.numel():
        return None
    state = scaled(state, as_count(facts, state, float(grad.flatten()[0])))
    return Total((state.factor,)) if isinstance(state, Rows) else state


def _can_follow() -> bool:
    """Whether torch.compile leaves a mode that follows operations alone, or is not in use."""
    import sys

    return hasattr(TorchDispatchMode, "ignore_compile_internals") or "torch._dynamo" not in sys.modules
