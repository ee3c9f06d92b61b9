# SPDX-License-Identifier: Apache-2.0
"""Which optimizer steps first: the one whose step releases. Another one over private parameters has nothing before."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from clipping.step.step_sum import StepSum


class StepOrder:
    """Refuses an optimizer that steps over parameters of `step` before its release, and would silently move nothing.

    `releasing` is the optimizer whose own step releases, None where `release()` is called by name. An optimizer whose
    gradients somebody has set, from public data say, may step at any time.
    """

    def __init__(self, step: StepSum) -> None:
        self.releasing: Optimizer | None = None
        self._step = step

    def attach(self) -> None:
        """Begin to look at every optimizer's steps."""
        global _handle
        _ATTACHED.add(self)
        if _handle is None:
            _handle = register_optimizer_step_pre_hook(_before_any_step)

    def detach(self) -> None:
        """Look no more."""
        global _handle
        _ATTACHED.discard(self)
        if not _ATTACHED and _handle is not None:
            _handle.remove()
            _handle = None

    def require(self, optimizer: Optimizer, closure: bool) -> None:
        """Raise RuntimeError where a drawn batch waits for its release, and `optimizer` has no gradient of it yet."""
        # A closure may release by itself; a part of a batch that is held releases nothing, whoever steps.
        if (
            optimizer is self.releasing
            or closure
            or self._step.admission.num_drawn is None
            or self._step.hold
        ):
            return
        private = {id(parameter) for parameter in self._step.parameters.values()}
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in private]
        if held and all(parameter.grad is None for parameter in held):
            first = (
                "release()" if self.releasing is None else "the step of the optimizer given to make_private"
            )
            raise RuntimeError(
                f"expected {first} before any other optimizer steps over the model's parameters; got the step of a "
                f"{type(optimizer).__name__} over {len(held)} of them, which have no gradient yet and would silently stay "
                "where they are; swap the two lines"
            )


_ATTACHED: WeakSet[StepOrder] = WeakSet()
_handle: RemovableHandle | None = None


def _before_any_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    closure = any(value is not None for value in (*args[1:], *kwargs.values()))
    for order in tuple(_ATTACHED):
        order.require(optimizer, closure)
