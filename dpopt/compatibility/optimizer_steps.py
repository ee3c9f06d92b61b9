# SPDX-License-Identifier: Apache-2.0
"""The step of a private optimizer: the batch drawn last is released before it, and its gradient is in place when it begins.

With `optimizer.step(closure)` the closure runs once, before the release, and its answer stands for it. A closure that an
optimizer runs again, or after it has moved the weights, wants another gradient than the one released.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from dpopt.release.write_gradients import clear_gradients
from dpopt.training import PrivateTraining

StepArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional arguments of `optimizer.step`, the optimizer first, and those by keyword."""


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
        if self._depth and step.admission.num_drawn is None:
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
        parameters = step.tape.parameters.values()
        answer = answered(args, kwargs, list(parameters))
        if self._holds():
            clear_gradients(parameters)
        else:
            self._require_backward()
            self._release()
        if answer is None:
            return None
        answer[1].seal()
        return answer[0]

    def _require_backward(self) -> None:
        drawn = self._training.sum.admission
        if drawn.num_drawn is not None and drawn.num_added < drawn.num_drawn:
            raise RuntimeError(
                "expected backward() through the private model for every drawn example before optimizer.step(); got "
                "fewer examples (or several passes whose rows were taken for the same examples); run the batch in "
                "one forward, or one backward for each part, or use BatchMemoryManager"
            )


class Answer:
    """A closure that has been run: gives its value once, while the gradient released for it is still in place."""

    def __init__(self, value: object, parameters: Sequence[nn.Parameter]) -> None:
        self._value = value
        self._parameters = parameters
        self._state: list[tuple[int, int]] | None = None

    def seal(self) -> None:
        """Note the gradients that were released, and the weights at which they were taken."""
        self._state = self._now()

    def __call__(self) -> object:
        """The value; raises RuntimeError where another gradient is asked for."""
        if self._state is None or self._state != self._now():
            raise RuntimeError(
                "expected an optimizer that asks its closure once a step, before it moves the weights; got one that asks "
                "again, or elsewhere (LBFGS, SAM), for a gradient that nobody paid for; use an optimizer of one gradient "
                "a step, or PrivateTraining with a batch and a release() for each gradient"
            )
        self._state = None
        return self._value

    def _now(self) -> list[tuple[int, int]]:
        return [(id(parameter.grad), parameter._version) for parameter in self._parameters]


def answered(
    args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> tuple[StepArguments, Answer] | None:
    """Run the closure among the arguments of `optimizer.step`; the arguments with its answer in place. None without one."""
    others = {key: value for key, value in kwargs.items() if key != "closure" and value is not None}
    closure: Callable[[], object] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if others or len(args) > 2 or not (closure is None or callable(closure)):
        raise ValueError(
            "expected optimizer.step() with at most a closure; got other arguments, which could hold un-noised "
            "gradients or losses; call step() or step(closure)"
        )
    if closure is None:
        return None
    with torch.enable_grad():
        answer = Answer(closure(), parameters)
    return ((args[0], answer), {}) if len(args) > 1 else (args, {"closure": answer}), answer


def check_steps(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step cannot be preceded by a release, or that needs several gradients for one step."""
    if not getattr(type(optimizer).step, "hooked", False) or not hasattr(
        optimizer, "_optimizer_step_pre_hooks"
    ):
        raise ValueError(
            f"expected an optimizer whose step runs hooks; got {type(optimizer).__name__}, which does not call "
            "torch.optim.Optimizer.__init__; give make_private the optimizer that it wraps, and step as before"
        )
    groups = optimizer.param_groups if isinstance(optimizer, LBFGS) else ()
    if any(group["max_iter"] != 1 or group["line_search_fn"] is not None for group in groups):
        raise ValueError(
            "expected an optimizer of one gradient a step; got LBFGS, which asks for more in each iteration and line "
            "search; make it with max_iter=1 and no line_search_fn, or use another optimizer"
        )


def check_optimizer(module: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that would train parameters of another module, which get no noise."""
    owned = {id(p) for p in module.parameters()}
    foreign = sum(
        id(p) not in owned for group in optimizer.param_groups for p in group["params"] if p.requires_grad
    )
    if foreign:
        raise ValueError(
            f"expected an optimizer over the module's own parameters; got {foreign} parameters of something else, "
            "which would be trained without noise; make one module of all that is trained, nn.ModuleList([encoder, head]) "
            "say, move it to its device, and build the optimizer from its parameters"
        )


class ScalerMark(NamedTuple):
    """Makes a GradScaler show itself to `optimizer`'s step, which it would otherwise refuse in its own words."""

    optimizer: Optimizer
    known: bool | None

    @staticmethod
    def on(optimizer: Optimizer) -> ScalerMark:
        """Mark."""
        mark = ScalerMark(optimizer, vars(optimizer).get(_SCALES))
        vars(optimizer)[_SCALES] = True
        return mark

    def remove(self) -> None:
        """Put back what was there."""
        if self.known is None:
            vars(self.optimizer).pop(_SCALES, None)
        else:
            vars(self.optimizer)[_SCALES] = self.known


_SCALES = "_step_supports_amp_scaling"


def refuse_scaler(optimizer: Optimizer) -> None:
    """Raise ValueError where a GradScaler called this step: it scaled the losses, which are clipped as they come."""
    found = [name for name in ("grad_scale", "found_inf") if vars(optimizer).pop(name, None) is not None]
    if found:
        raise ValueError(
            "expected losses as they are; got a GradScaler, whose scale would clip every example and whose search for "
            "infinities would look at un-noised gradients; drop it, and use torch.autocast with torch.bfloat16"
        )
