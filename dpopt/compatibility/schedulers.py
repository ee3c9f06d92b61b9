# SPDX-License-Identifier: Apache-2.0
"""Schedules of the noise multiplier and of the clip norm, stepped by the training loop, with the names that Opacus has.

    engine.make_private(module=model, optimizer=optimizer, ...)
    scheduler = ExponentialNoise(optimizer, gamma=0.99)
    for epoch in range(epochs):
        train_one_epoch()
        scheduler.step()

| function | the value after e calls of `step()` |
|---|---|
| `ExponentialNoise`, `ExponentialGradClip` | value at the start * gamma^e |
| `StepNoise`, `StepGradClip` | value at the start * gamma^(e // step_size) |
| `LambdaNoise`, `LambdaGradClip` | value at the start * function(e) |

Each step of the run is charged with the noise that it got. A schedule is public and fixed before the data are seen: a
function that looks at losses or weights is not. Within a budget (`make_private_with_epsilon`) the whole schedule has
to be known when the noise is computed: say it there, `clipping="schedule:steps=1000,noise_end=0.7"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from torch.optim import Optimizer

from dpopt.compatibility.private_optimizer import Attached, attached_to
from dpopt.public_numbers import check_real

Next = Callable[[float, int], float]
"""(present value, number of the epoch that begins) -> value."""


class Scheduler:
    """Moves one public number of a private run: the noise multiplier or the clip norm.

    Args:
        attached: the run.
        name: "noise_multiplier" or "max_grad_norm".
        following: the next value.
        last_epoch: the number of the epoch before the first.
    """

    def __init__(self, attached: Attached, name: str, following: Next, last_epoch: int) -> None:
        self._attached = attached
        self._name = name
        self._following = following
        self.last_epoch = last_epoch
        attached.require_variable(name)
        attached.training.ledger.note(f"{name} follows a public schedule from here on")
        self.step()

    @property
    def value(self) -> float:
        """The present one."""
        return cast("float", getattr(self._attached, self._name))

    def step(self) -> None:
        """An epoch has ended: move on.

        Raises:
            ValueError: the run has a budget, or the next value is not above 0.
        """
        self._set(self._following(self.value, self.last_epoch + 1))
        self.last_epoch += 1

    def state_dict(self) -> dict[str, float]:
        """The epoch, and the present value."""
        return {"last_epoch": self.last_epoch, self._name: self.value}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Go on where another scheduler of this kind was, with its value.

        Raises:
            ValueError: the state is of something else.
        """
        if set(state_dict) != {"last_epoch", self._name}:
            raise ValueError(
                f"expected the state of a schedule of {self._name}, with last_epoch; got {sorted(state_dict)}; load that "
                "which state_dict() of the same kind of scheduler gave"
            )
        self._set(state_dict[self._name])
        self.last_epoch = int(state_dict["last_epoch"])

    def _set(self, value: float) -> None:
        check_real(self._name, value)
        change = self._attached.change_noise if self._name == _NOISE else self._attached.change_clip_norm
        change(float(value))


_NOISE, _CLIP = "noise_multiplier", "max_grad_norm"


def ExponentialNoise(optimizer: Optimizer, *, gamma: float, last_epoch: int = -1) -> Scheduler:
    """Multiply the noise multiplier by `gamma` at every `step()`."""
    return _multiplied(optimizer, _NOISE, gamma, 1, last_epoch)


def StepNoise(optimizer: Optimizer, *, step_size: int, gamma: float, last_epoch: int = -1) -> Scheduler:
    """Multiply the noise multiplier by `gamma` at every `step_size`-th `step()`."""
    return _multiplied(optimizer, _NOISE, gamma, step_size, last_epoch)


def LambdaNoise(
    optimizer: Optimizer, *, noise_lambda: Callable[[int], float], last_epoch: int = -1
) -> Scheduler:
    """The noise multiplier at the start, times `noise_lambda` of the number of the epoch, which counts from 0."""
    return _scaled(optimizer, _NOISE, noise_lambda, last_epoch)


def ExponentialGradClip(optimizer: Optimizer, *, gamma: float, last_epoch: int = -1) -> Scheduler:
    """Multiply the clip norm by `gamma` at every `step()`."""
    return _multiplied(optimizer, _CLIP, gamma, 1, last_epoch)


def StepGradClip(optimizer: Optimizer, *, step_size: int, gamma: float, last_epoch: int = -1) -> Scheduler:
    """Multiply the clip norm by `gamma` at every `step_size`-th `step()`."""
    return _multiplied(optimizer, _CLIP, gamma, step_size, last_epoch)


def LambdaGradClip(
    optimizer: Optimizer, *, scheduler_function: Callable[[int], float], last_epoch: int = -1
) -> Scheduler:
    """The clip norm at the start, times `scheduler_function` of the number of the epoch, which counts from 0."""
    return _scaled(optimizer, _CLIP, scheduler_function, last_epoch)


def _multiplied(optimizer: Optimizer, name: str, gamma: float, step_size: int, last_epoch: int) -> Scheduler:
    check_real("gamma", gamma)
    if not gamma > 0 or isinstance(step_size, bool) or step_size < 1:
        raise ValueError(
            f"expected gamma > 0 and step_size >= 1; got {gamma} and {step_size}; gamma=0.99 with step_size=1 takes away "
            "a hundredth each time"
        )

    def following(value: float, epoch: int) -> float:
        return value * gamma if epoch > 0 and epoch % step_size == 0 else value

    return Scheduler(attached_to(optimizer), name, following, last_epoch)


def _scaled(optimizer: Optimizer, name: str, function: Callable[[int], float], last_epoch: int) -> Scheduler:
    attached = attached_to(optimizer)
    base = getattr(attached, name)
    return Scheduler(attached, name, lambda value, epoch: base * function(epoch), last_epoch)
