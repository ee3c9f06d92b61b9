# SPDX-License-Identifier: Apache-2.0
"""A look at each backward before it begins: afterwards, what its nodes saved is gone.

Torch has no hook there. While a run is watched, the one function through which `Tensor.backward`,
`torch.autograd.backward` and `torch.autograd.grad` call the engine is wrapped; it is put back with the last run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

_autograd: Any = torch.autograd


class Watcher(Protocol):
    """What wants to see backwards."""

    def before(self, roots: Sequence[Any], grads: Sequence[Any], second_order: bool) -> None:
        """A backward of `roots` begins, with these gradients of theirs, or 1.0 for each; raise to refuse it."""
        ...

    def after(self) -> None:
        """It has ended, or failed, or was refused."""
        ...

    def made(self, roots: Sequence[Any], inputs: Sequence[Any], grads: Sequence[Tensor | None]) -> None:
        """It has ended, and made `grads` of `inputs`, or wrote those of all leaves."""
        ...


class Entrance:
    """The wrapped function and who watches, as long as they live; one for the process."""

    def __init__(self) -> None:
        self._watchers: list[ref[Watcher]] = []
        self._original: Any = None

    def enter(self, watcher: Watcher) -> None:
        """Begin to tell `watcher`."""
        if self._original is None:
            self._original = _autograd._engine_run_backward
            _autograd._engine_run_backward = self._run
        self._watchers.append(ref(watcher))

    def leave(self, watcher: Watcher | None) -> None:
        """Tell `watcher` no more, nor those that are gone."""
        self._watchers = [known for known in self._watchers if known() not in (watcher, None)]
        # Where somebody wrapped the function after us, ours stays below theirs and only hands on.
        if not self._watchers and _autograd._engine_run_backward == self._run:
            _autograd._engine_run_backward, self._original = self._original, None

    def _run(self, roots: Any, grads: Any, keep: Any, create: Any, *args: Any, **kwargs: Any) -> Any:
        told: list[Watcher] = []
        run, implicit = self._original, _implicit(grads)
        try:
            for known in tuple(self._watchers):
                watcher = known()
                if watcher is None:
                    self.leave(None)
                    continue
                told.append(watcher)
                watcher.before(roots, [1.0] * len(roots) if implicit else grads, bool(create))
            found = run(roots, grads, keep, create, *args, **kwargs)
            for watcher in told:
                watcher.made(roots, args[0] if args else (), found or ())
            return found
        finally:
            for watcher in told:
                watcher.after()


def _implicit(grads: Sequence[Any]) -> bool:
    """Whether a backward starts from ones that torch filled in, which a device need not be stopped to read."""
    if not any(isinstance(grad, torch.Tensor) and grad.device.type != "cpu" for grad in grads):
        return False
    caller = sys._getframe(2)
    given = {torch.autograd.backward: "grad_tensors", torch.autograd.grad: "grad_outputs"}
    names = (name for function, name in given.items() if function.__code__ is caller.f_code)
    return caller.f_locals.get(next(names, ""), grads) is None


ENTRANCE = Entrance()
