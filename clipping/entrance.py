# SPDX-License-Identifier: Apache-2.0
"""A look at each backward before it begins: whose rows are is asked of the losses, while their graph is there.

Torch has no hook there. While a run is watched, the one function through which `Tensor.backward`,
`torch.autograd.backward` and `torch.autograd.grad` call the engine is wrapped; it is put back with the last run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import ref

import torch

_AUTOGRAD: Any = torch.autograd  # whose way into the engine is private


class Watcher(Protocol):
    """What wants to see backwards."""

    def before(self, roots: Sequence[Any]) -> None:
        """A backward of `roots` begins; raise to refuse it."""
        ...


class Entrance:
    """The wrapped function and who watches, as long as they live; one for the process."""

    def __init__(self) -> None:
        self._watchers: list[ref[Watcher]] = []
        self._original: Any = None

    def enter(self, watcher: Watcher) -> None:
        """Begin to tell `watcher`."""
        if self._original is None:
            self._original = _AUTOGRAD._engine_run_backward
            _AUTOGRAD._engine_run_backward = self._run
        self._watchers.append(ref(watcher))

    def leave(self, watcher: Watcher) -> None:
        """Tell `watcher` no more."""
        self._watchers = [known for known in self._watchers if known() not in (watcher, None)]
        # Where somebody wrapped the function after us, ours stays below theirs and only hands on.
        if not self._watchers and _AUTOGRAD._engine_run_backward == self._run:
            _AUTOGRAD._engine_run_backward, self._original = self._original, None

    def _run(self, roots: Any, *args: Any, **kwargs: Any) -> Any:
        for known in tuple(self._watchers):
            watcher = known()
            if watcher is not None:
                watcher.before(roots)
        return self._original(roots, *args, **kwargs)


ENTRANCE = Entrance()
