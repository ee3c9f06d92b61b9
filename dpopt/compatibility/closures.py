# SPDX-License-Identifier: Apache-2.0
"""`optimizer.step(closure)` over a private step: the closure runs once, before the release, and its answer stands for it.

A closure that an optimizer runs again, or after it has moved the weights, wants another gradient than the one released.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

StepArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional arguments of `optimizer.step`, the optimizer first, and those by keyword."""


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
