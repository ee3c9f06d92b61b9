# SPDX-License-Identifier: Apache-2.0
"""The model while a run is open: its hooks, and what must stay as it was when the run began."""

from __future__ import annotations

import os

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipping.entrance import ENTRANCE
from dpopt import unchanged
from dpopt.gradients import clear_gradients
from dpopt.step import StepSum


class Watch:
    """Attaches the tape of `step` and the probe to `model`, and looks for changes that would be published un-noised."""

    def __init__(self, model: nn.Module, step: StepSum) -> None:
        self._model = model
        self._step = step
        self._pid = os.getpid()
        self._probe: RemovableHandle | None = None
        self._buffers: dict[str, Tensor] = {}

    def attach(self) -> None:
        """Note the buffers, clear every `.grad`, and start recording."""
        buffers = unchanged.persistent_buffers(self._model)
        self._buffers = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        # An old gradient was never noised, and optimizers apply it even to a parameter frozen since.
        clear_gradients(self._model.parameters())
        self._step.tape.attach()
        ENTRANCE.enter(self._step)
        probing = self._step.probing
        self._probe = self._model.register_forward_pre_hook(probing.watch_inputs, with_kwargs=True)

    def detach(self) -> None:
        """Remove every hook."""
        if self._probe is not None:
            self._probe.remove()
        ENTRANCE.leave(self._step)
        self._step.tape.detach()

    def check(self) -> None:
        """Raise RuntimeError in a forked process, or where parameters or buffers are no longer what they were."""
        unchanged.refuse_fork(self._pid)
        self._step.require_whole()
        self._step.admission.require_counted()
        unchanged.refuse_changed_parameters(self._step.parameters, self._model)
        unchanged.refuse_changed_buffers(self._buffers, self._model)
