# SPDX-License-Identifier: Apache-2.0
"""The step of a private optimizer: the batch drawn last is released before it, and its gradient is in place when it begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dpopt.compatibility.closures import StepArguments, answered
from dpopt.compatibility.opacus_arguments import check_optimizer, refuse_scaler
from dpopt.release.write_gradients import clear_gradients
from dpopt.training import PrivateTraining


class OptimizerStep:
    """Hooks around `optimizer.step()` of one run.

    `holds` tells whether more parts of the drawn batch are to come: then nothing is released, and the step finds no
    gradient. `release` releases the batch (default: the run's own).
    """

    def __init__(
        self,
        training: PrivateTraining,
        *,
        holds: Callable[[], bool] | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self._training = training
        self._holds = holds or (lambda: training.sum.hold)
        self._release = release or training.release
        self._depth = 0

    def attach(self, optimizer: Optimizer) -> list[RemovableHandle]:
        """Register both hooks."""
        return [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StepArguments | None:
        refuse_scaler(optimizer)
        step = self._training.sum
        if step.tape.is_aside:  # a step on public examples
            return None
        # A subclass's step may call that of its class, whose hooks run again; the gradient is in place by then.
        if self._depth and step.num_drawn is None:
            self._depth += 1
            return None
        self._depth = 0
        given = self._released(optimizer, args, kwargs)
        self._depth = 1
        return given

    def _after(self, *_: object) -> None:
        self._depth = max(0, self._depth - 1)

    def _released(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StepArguments | None:
        step = self._training.sum
        check_optimizer(self._training.model, optimizer)
        answer = answered(args, kwargs, list(step.parameters.values()))
        if self._holds():
            clear_gradients(step.parameters.values())
        else:
            self._require_backward()
            self._release()
        if answer is None:
            return None
        answer[1].seal()
        return answer[0]

    def _require_backward(self) -> None:
        step = self._training.sum
        if step.num_drawn is not None and step.num_added < step.num_drawn:
            raise RuntimeError(
                "expected backward() through the private model for every drawn example before optimizer.step(); got "
                "fewer examples (or several passes whose rows were taken for the same examples); run the batch in "
                "one forward, or one backward for each part, or use BatchMemoryManager"
            )
