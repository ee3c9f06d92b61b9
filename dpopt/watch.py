# SPDX-License-Identifier: Apache-2.0
"""The model while a run is open: its hooks, and what must stay as it was when the run began."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipping.altered import HOOKS
from clipping.compiled import untraced
from clipping.entrance import ENTRANCE
from dpopt import unchanged
from dpopt.gradients import clear_gradients
from dpopt.open_runs import OpenRun
from dpopt.step import StepSum
from dpopt.step_order import StepOrder


class Watch:
    """Attaches the tape of `step` and the probe to `model`, and looks for changes that would be published un-noised."""

    def __init__(self, model: nn.Module, step: StepSum) -> None:
        self.order = StepOrder(step)
        self._model = model
        self._step = step
        self._pid = os.getpid()
        self._hooks: list[RemovableHandle] = []
        self._buffers: dict[str, Tensor] = {}

    def attach(self, end: Callable[[], None]) -> None:
        """Note the buffers, clear every `.grad`, and start recording; `end` ends the run."""
        self.note_buffers()
        # An old gradient was never noised, and optimizers apply it even to a parameter frozen since.
        clear_gradients(self._model.parameters())
        self._step.tape.attach()
        ENTRANCE.enter(self._step)
        HOOKS.enter(self._step)
        probing, rehearsing = self._step.probing, self._step.rehearsing
        before, after = untraced(rehearsing.before), untraced(rehearsing.after)
        self._hooks.append(self._model.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        self._hooks.append(self._model.register_forward_hook(after, with_kwargs=True))
        self._hooks.append(self._model.register_forward_pre_hook(probing.watch_inputs, with_kwargs=True))
        self._hooks.append(self._model.register_forward_pre_hook(OpenRun(self._model, end)))
        self.order.attach()

    def note_buffers(self) -> None:
        """Take the buffers as they are for public: at the beginning, and when a public checkpoint was loaded."""
        buffers = unchanged.persistent_buffers(self._model)
        self._buffers = {name: buffer.detach().clone() for name, buffer in buffers.items()}

    def detach(self) -> None:
        """Remove every hook."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        ENTRANCE.leave(self._step)
        HOOKS.leave(self._step)
        self._step.tape.detach()
        self.order.detach()

    @contextmanager
    def public_examples(self) -> Iterator[None]:
        """A block in which the model is an ordinary one; see `PrivateTraining.public_examples`."""
        self._step.require_nothing_pending()
        # Written by a private forward, they would be taken for public from here on.
        unchanged.refuse_changed_buffers(self._buffers, self._model)
        try:
            with self._step.tape.set_aside():
                yield
        except BaseException:
            clear_gradients(self._model.parameters())
            raise
        finally:
            self.note_buffers()
            self._step.tape.turns.renew()

    def check(self) -> None:
        """Raise RuntimeError in a forked process, or where parameters or buffers are no longer what they were."""
        unchanged.refuse_fork(self._pid)
        self._step.require_whole()
        self._step.admission.require_counted()
        unchanged.refuse_changed_parameters(self._step.parameters, self._model)
        unchanged.refuse_changed_buffers(self._buffers, self._model)
