# SPDX-License-Identifier: Apache-2.0
"""An optimizer whose steps release, and what scripts written for Opacus read and call on it.

| on the optimizer | what it is |
|---|---|
| `noise_multiplier`, `max_grad_norm`, `expected_batch_size` | public numbers of the step to come |
| `loss_reduction`, `accumulated_iterations` | as given; 1 |
| `original_optimizer` | the optimizer itself: nothing is wrapped |
| `attach_step_hook(fn)` | `fn(optimizer)` is called between each release and the step |
| `signal_skip_step(do_skip=True)` | the next `step()` holds: its examples are parts of a batch whose rest is to come |
| `virtual_step()` | nothing: parts add up by themselves |

They are attributes of that one object, for the time of the run: its class stays, `state_dict()` does not know them,
torch leaves them out of copies and pickles, and `detach()` removes them. A name that the optimizer has already stays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary

from torch.optim import Optimizer

from dpopt.budget.payments import require_variable
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.quantile import Quantile
from dpopt.estimators.schedule import Scheduled
from dpopt.estimators.slack import Slack
from dpopt.release.write_gradients import clear_gradients
from dpopt.training import PrivateTraining

StepHook = Callable[[Optimizer], object]
"""Called with the optimizer between a release and its step."""


class Removable(Protocol):
    """A hook that can be taken away again."""

    def remove(self) -> None:
        """Take it away."""
        ...


class Attached:
    """One run of a `PrivacyEngine`: its model, its optimizer, and the hooks on both.

    `make_private(wrap_model=False)` returns it in the model's place, as Opacus does: the model is used as it is, and
    `cleanup()` ends the run.
    """

    def __init__(
        self,
        training: PrivateTraining,
        optimizer: Optimizer,
        *,
        max_grad_norm: float | Sequence[float],
        loss_reduction: str,
        clipped_at: Callable[[float], Estimator] | None,
        ended: Callable[[Attached], None],
    ) -> None:
        self.training = training
        self.optimizer = optimizer
        self.hooks: list[Removable] = []
        self._given = max_grad_norm
        self.loss_reduction = loss_reduction
        self._clipped_at = clipped_at
        self._ended = ended
        self._skips: deque[bool] = deque()
        self._step_hook: StepHook | None = None
        self._told: dict[str, object] = {}

    def attach(self) -> None:
        """Tell the optimizer's numbers and take its calls."""
        self._told = {
            "original_optimizer": self.optimizer,
            "attach_step_hook": self.attach_step_hook,
            "signal_skip_step": self.signal_skip_step,
            "virtual_step": self.virtual_step,
            **self._numbers(),
        }
        self._told = {name: value for name, value in self._told.items() if not hasattr(self.optimizer, name)}
        vars(self.optimizer).update(self._told)
        self.training.order.releasing = self.optimizer
        _ATTACHED[id(self.optimizer)] = self

    def cleanup(self) -> None:
        """End the run: remove every hook and attribute. Model and optimizer are ordinary again."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        for name in self._told:
            vars(self.optimizer).pop(name, None)
        self._told = {}
        if _ATTACHED.get(id(self.optimizer)) is self:
            del _ATTACHED[id(self.optimizer)]
        self.training.__exit__(None, None, None)
        self._ended(self)

    def remove_hooks(self) -> None:
        """End the run, under Opacus' other name for it."""
        self.cleanup()

    # -- what the optimizer takes -----------------------------------------------------------------------

    def attach_step_hook(self, fn: StepHook) -> None:
        """Call `fn(optimizer)` after each release, before the optimizer steps. One hook at a time, as in Opacus.

        What it sees is public. The ledger charges each step whether or not a hook counts it.
        """
        self._step_hook = fn

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Let the next `step()` that nobody spoke for yet hold its examples (`do_skip`), or release."""
        self._skips.append(do_skip)

    def virtual_step(self) -> None:
        """Nothing, inside a step: each backward has added its clipped gradients already."""
        self.training.sum.admission.require_drawn()
        clear_gradients(self.training.sum.parameters.values())

    # -- around a step ----------------------------------------------------------------------------------

    def holds(self) -> bool:
        """Whether this `step()` is of a part of the drawn batch, and releases nothing.

        Raises:
            RuntimeError: somebody wrote one of the optimizer's numbers, which would do nothing.
        """
        self._require_told()
        skip = self._skips.popleft() if self._skips else False
        return skip or self.training.sum.hold

    def release(self) -> None:
        """Release the drawn batch, renew the numbers, and call the user's hook."""
        checks = self.training.sum.checks
        if checks is not None:
            checks.settle()
        self.training.release()
        self._renew()
        if self._step_hook is not None:
            self._step_hook(self.optimizer)

    # -- schedules --------------------------------------------------------------------------------------

    @property
    def noise_multiplier(self) -> float:
        """That of the step to come."""
        mechanism: Any = self.training.mechanism
        factors = self.training.estimator.factors
        factor = 1.0 if factors is None else factors(self.training.payments.rounds.charged)
        return mechanism.noise_multiplier * factor

    @property
    def max_grad_norm(self) -> float | Sequence[float]:
        """That of the step to come."""
        estimator = self.training.estimator
        if isinstance(estimator, Quantile | Slack | Scheduled):
            stage = estimator.stage(self.training.payments.rounds.charged)
            return stage.contribution.clipper.clip_norms[0]
        return self._given

    def change_noise(self, noise_multiplier: float) -> None:
        """Another noise multiplier from now on, by a public schedule: see `PrivateTraining.vary`."""
        if noise_multiplier != self.noise_multiplier:
            self.training.vary(noise_multiplier=noise_multiplier)
            self._renew()

    def change_clip_norm(self, max_grad_norm: float) -> None:
        """Another clip norm from the next step on, by a public schedule."""
        self.require_variable("max_grad_norm")
        assert self._clipped_at is not None
        if max_grad_norm != self._given:
            self.training.vary(estimator=self._clipped_at(max_grad_norm))
            self._given = max_grad_norm
            self._renew()

    def require_variable(self, name: str) -> None:
        """Raise ValueError where the noise multiplier or the clip norm is not a schedule's to move."""
        if name == "noise_multiplier":
            if self.noise_multiplier != 0:
                require_variable(self.training.payments.budget, self.training.sampling, self.noise_multiplier)
        elif self._clipped_at is None or not isinstance(self._given, int | float):
            raise ValueError(
                "expected one max_grad_norm and a way to clip that follows nothing else where a schedule moves it; got "
                f'{self.training.estimator.setting["name"]!r} with max_grad_norm={self._given}; use clipping="flat"'
            )

    def _numbers(self) -> dict[str, object]:
        return {
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "expected_batch_size": self.training.sampling.expected_batch_size,
            "loss_reduction": self.loss_reduction,
            "accumulated_iterations": 1,
        }

    def _renew(self) -> None:
        self._require_told()
        new = {name: value for name, value in self._numbers().items() if name in self._told}
        self._told.update(new)
        vars(self.optimizer).update(new)

    def _require_told(self) -> None:
        found = vars(self.optimizer)
        pairs = ((name, found.get(name, value), value) for name, value in self._told.items())
        odd = [name for name, now, value in pairs if now is not value and now != value]
        if odd:
            vars(self.optimizer).update({name: self._told[name] for name in odd})
            raise RuntimeError(
                f"expected optimizer.{odd[0]} to be read only; got another value written, which would change nothing (it "
                "has been put back); a schedule of the noise or the clip norm is one of those in dpopt, such as "
                "LambdaNoise(optimizer, noise_lambda=...), made after make_private"
            )


def attached_to(optimizer: Optimizer) -> Attached:
    """The run whose steps `optimizer` releases.

    Raises:
        ValueError: none does.
    """
    found = _ATTACHED.get(id(optimizer))
    if found is None or found.optimizer is not optimizer:
        raise ValueError(
            f"expected the optimizer of an open private run; got a {type(optimizer).__name__} that make_private has not "
            "seen, or whose run has ended; call make_private first"
        )
    return found


_ATTACHED: WeakValueDictionary[int, Attached] = WeakValueDictionary()
