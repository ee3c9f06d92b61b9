# SPDX-License-Identifier: Apache-2.0
"""What moves the weights once a gradient is released: the optimizer by name, its schedule, and an average of iterates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dpopt.optimizers import AdamBC, Averaged, exponential, noise_std_of
from dpopt.training import PrivateTraining

Builder = Callable[[Iterable[nn.Parameter], float, PrivateTraining], Optimizer]

OPTIMIZERS: Mapping[str, Builder] = {
    "adamw": lambda parameters, rate, private: AdamW(parameters, lr=rate, weight_decay=0.0),
    "adam-bc": lambda parameters, rate, private: AdamBC(
        parameters, lr=rate, weight_decay=0.0, noise_std=noise_std_of(private)
    ),
    "sgd": lambda parameters, rate, private: SGD(parameters, lr=rate, momentum=0.9, dampening=0.9),
}
"""Name: what makes the optimizer of a run. "adam-bc" asks the run for the noise in each gradient."""


class Tuning:
    """Steps an optimizer with a linearly falling rate, and keeps an average of the iterates where one is wanted."""

    def __init__(
        self,
        model: nn.Module,
        private: PrivateTraining,
        *,
        optimizer: str,
        learning_rate: float,
        steps: int,
        averaging: float | None,
    ) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._model = model
        self._optimizer = OPTIMIZERS[optimizer](parameters, learning_rate, private)
        self._schedule = LambdaLR(self._optimizer, lambda step: 1 - step / steps)
        self._average = None if averaging is None else Averaged(model, exponential(averaging))
        self._taken = 0

    def step(self) -> None:
        """One step on the gradients that were released."""
        self._optimizer.step()
        self._schedule.step()
        self._taken += 1
        if self._average is not None:
            self._average.update()

    def shown(self) -> AbstractContextManager[None]:
        """A block in which the model is as it would be saved now."""
        if self._average is None or not self._taken:
            return nullcontext()
        return self._average.applied()

    def finish(self) -> None:
        """Leave the model as it is to be saved."""
        if self._average is not None and self._taken:
            self._average.copy_to(self._model)
