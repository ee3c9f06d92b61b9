# SPDX-License-Identifier: Apache-2.0
"""Hooks that a loop sets on tensors: they may look at a gradient, and not change it on its way to a private model.

A hook leaves no trace in a graph. While a run is watched, `Tensor.register_hook` is wrapped; it is put back with the
last run. Hooks that a model's forward sets are rehearsed with it (`clipping.validators.rehearsal`), and not looked at here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor

from clipping.errors import MixesExamples
from clipping.recording.row_graph import points, tape_of
from clipping.recording.tape import Tape

_tensor: Any = Tensor


class Owner(Protocol):
    """What watches the backwards of a private model."""

    @property
    def in_forward(self) -> bool:
        """Whether the model's own code runs now."""
        ...

    def altered(self) -> None:
        """A hook has changed a gradient: raise where the running backward reaches the model."""
        ...


class _Hook(NamedTuple):
    hook: Callable[[Tensor], Any]
    told: Callable[[], None]

    def __call__(self, grad: Tensor) -> Any:
        version = grad._version
        found = self.hook(grad)
        if (found is not None and found is not grad) or grad._version != version:
            self.told()
        return found


class Hooks:
    """The wrapped function and who watches, as long as they live; one for the process."""

    def __init__(self) -> None:
        self._owners: list[ref[Owner]] = []
        self._original: Any = None
        self._ours: Any = None

    def enter(self, owner: Owner) -> None:
        """Begin to look, for `owner`."""
        if self._original is None:
            original = self._original = Tensor.register_hook

            def register_hook(tensor: Tensor, hook: Callable[[Tensor], Any]) -> Any:
                return original(tensor, self._wrapped(tensor, hook))

            register_hook.__doc__ = original.__doc__
            self._ours = register_hook
            _tensor.register_hook = register_hook
        self._owners.append(ref(owner))

    def leave(self, owner: Owner | None) -> None:
        """Look no more for `owner`, nor for those that are gone."""
        self._owners = [known for known in self._owners if known() not in (owner, None)]
        # Where somebody wrapped the function after us, ours stays below theirs and only hands on.
        if not self._owners and Tensor.register_hook is self._ours:
            _tensor.register_hook, self._original = self._original, None

    def _wrapped(self, tensor: Tensor, hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        owners = [x for known in self._owners if (x := known()) is not None]
        # Nothing of a private model lies below a leaf.
        if torch.compiler.is_compiling() or tensor.grad_fn is None or any(x.in_forward for x in owners):
            return hook
        return _Hook(hook, self._told)

    def _told(self) -> None:
        for known in tuple(self._owners):
            owner = known()
            if owner is not None:
                owner.altered()


HOOKS = Hooks()


def reaches(roots: Sequence[Any], tape: Tape) -> bool:
    """Whether a backward of `roots` gets to a layer that `tape` records."""
    stack: list[Any] = [x.grad_fn if isinstance(x, Tensor) else x.node for x in roots]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if any(tape_of(point) is tape for point in points(node)):
            return True
        stack += [below for below, _ in node.next_functions]
    return False


def refuse_altered() -> None:
    """Raise MixesExamples."""
    raise MixesExamples(
        "expected hooks on tensors to look at gradients, and leave them as they are; got one that changed a gradient on its way "
        "to the model, which could make it depend on other examples; put the factor into each example's loss, or into the "
        "model's forward, where it is checked"
    )
