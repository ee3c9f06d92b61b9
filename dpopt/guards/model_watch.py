# SPDX-License-Identifier: Apache-2.0
"""The model while a run is open: its hooks, and what must stay as it was when the run began."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clipping.recording.altered_gradients import HOOKS
from clipping.recording.before_backward import ENTRANCE
from clipping.recording.torch_compile import untraced
from clipping.step.step_sum import StepSum
from dpopt.guards.open_runs import OpenRun
from dpopt.guards.step_order import StepOrder
from dpopt.release.write_gradients import clear_gradients


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
        buffers = persistent_buffers(self._model)
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
        refuse_changed_buffers(self._buffers, self._model)
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
        refuse_fork(self._pid)
        self._step.require_whole()
        self._step.admission.require_counted()
        refuse_changed_parameters(self._step.tape.parameters, self._model)
        refuse_changed_buffers(self._buffers, self._model)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Each buffer that `state_dict` would publish, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    # By value: versions miss writes through `.data`, and == misses an unchanged NaN.
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    flat_a, flat_b = (x.detach().reshape(-1).to(a.device).view(torch.uint8) for x in (a, b))
    return torch.equal(flat_a, flat_b)


def refuse_changed_buffers(before: dict[str, Tensor], model: nn.Module) -> None:
    """Raise RuntimeError where a buffer that would be published differs from `before`: it was never noised."""
    now = persistent_buffers(model)
    changed = sorted(name for name in now if name not in before or not _same_bytes(now[name], before[name]))
    if changed:
        raise RuntimeError(
            f"expected buffers that do not change in training; got changes in {changed[:4]}, which would be "
            "published without noise; freeze the module that writes them (eval()); a buffer that is "
            "never saved (persistent=False) must still hold nothing that a later batch reads"
        )


def refuse_changed_parameters(parameters: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Raise RuntimeError where the trainable parameters are no longer those that were made private."""
    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    odd = [name for name in {*now, *parameters} if now.get(name) is not parameters.get(name)]
    if odd:
        raise RuntimeError(
            f"expected the trainable parameters that were made private; got changes at {sorted(odd)[:4]}; freeze, "
            "unfreeze, add adapters and move the model to its device before making it private"
        )


def refuse_fork(pid: int) -> None:
    """Raise RuntimeError in another process than `pid`, which started the run."""
    if os.getpid() != pid:
        raise RuntimeError(
            "expected release() in the process that started the run; got a forked one, which would repeat its noise; "
            "start a run of its own there"
        )


def refuse_closed() -> NoReturn:
    """Raise RuntimeError: a run is not open, and nothing in it would be private."""
    raise RuntimeError(
        "expected an open run; got one that has ended or not begun, where nothing would be private; draw inside its "
        "`with` statement, or before detach()"
    )


def refuse_distributed() -> None:
    """Raise RuntimeError in a process group: ranks would draw and noise on their own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                "expected a single process; got an initialised process group of "
                f"{torch.distributed.get_world_size()}; distributed private steps are not supported yet"
            )
