# SPDX-License-Identifier: Apache-2.0
"""Averages of the private iterates: less noise in the weights, for no budget.

After update t = 0, 1, ... the average is d_t * average + (1 - d_t) * weights. A rule says what share d_t the old
average keeps. torch's `AveragedModel` is not used: it deep-copies the module with the hooks of a run in progress,
frozen weights included, and holds bfloat16 averages in bfloat16, where a decay of 0.999 changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Rule = Callable[[int], float]
"""(number of updates before this one) -> share in [0, 1] that the old average keeps."""


def exponential(decay: float = 0.999) -> Rule:
    """d_t = min(decay, (1 + t) / (10 + t)): a moving average that forgets the initial weights fast.

    The warm-up is that of De et al. 2022 (arXiv:2204.13650). About the last 1 / (1 - decay) iterates count.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"expected a decay >= 0 and < 1; got {decay}; 0.999 is usual")
    return lambda t: min(decay, (1 + t) / (10 + t))


def uniform(start: int = 0) -> Rule:
    """The plain mean of all iterates from update `start` on (tail averaging); before it, the latest weights."""
    if start < 0:
        raise ValueError(f"expected a start >= 0; got {start}; it counts updates")
    return lambda t: max(0, t - start) / (max(0, t - start) + 1)


class Averaged:
    """The average of a model's trainable parameters over the steps of a run.

    Call `update()` after each optimizer step. Averages are kept in float32 or better, one copy of the trainable
    parameters. Frozen parameters are left out. So are buffers: a private run refuses those that change.
    Training must go on with the plain weights: the average is for evaluation and export.

        averaged = Averaged(model, exponential(0.999))
        ...
        optimizer.step()
        averaged.update()
        ...
        with averaged.applied():
            evaluate(model)

    Guarantees
    ----------
    The average is a function of the private iterates and public numbers: post-processing (Dwork and Roth 2014,
    proposition 2.1), it costs nothing. It is the convex combination that the rule states
    (test_guarantee_the_average_is_the_stated_combination). `applied` puts back the very bits that it found, also
    where the block raises (test_guarantee_applied_restores_the_weights). Choosing between the average and the plain
    weights by private data is not free.
    """

    def __init__(self, model: nn.Module, rule: Rule | None = None) -> None:
        self.rule = exponential() if rule is None else rule
        self.updates = 0
        self._model = model
        self._applied = False
        self._average = {name: _precise(p) for name, p in _trainable(model).items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights into the average."""
        if self._applied:
            raise RuntimeError(
                "expected update() on trained weights; got it inside applied(), where the model holds the average; "
                "call it after the block"
            )
        keep = self.rule(self.updates)
        if not 0 <= keep <= 1:
            raise ValueError(f"expected a share in [0, 1] from the rule; got {keep}; correct the rule")
        for average, parameter in self._pairs(self._model):
            average.lerp_(parameter.to(average.dtype), 1 - keep)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A block in which the model holds the average, in its own dtype; its weights come back afterwards.

        Steps taken inside are lost. Blocks do not nest.
        """
        if self._applied:
            raise RuntimeError(
                "expected one applied() block at a time; got one inside another; leave one out"
            )
        before = [(p, p.detach().clone()) for _, p in self._pairs(self._model)]
        self._applied = True
        try:
            self.copy_to(self._model)
            yield
        finally:
            with torch.no_grad():
                for parameter, weights in before:
                    parameter.copy_(weights)
            self._applied = False

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into the trainable parameters of `model`, which must have the same names and shapes."""
        for average, parameter in self._pairs(model):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates and a copy of the average, for `load_state_dict`. Public, as the weights are."""
        return {"updates": self.updates, "average": {name: a.clone() for name, a in self._average.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave; the rule is not part of it."""
        _require_same(_shapes(self._average), _shapes(state["average"]))
        for name, average in self._average.items():
            average.copy_(state["average"][name])
        self.updates = int(state["updates"])

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
        parameters = _trainable(model)
        _require_same(_shapes(self._average), _shapes(parameters))
        return [(average, parameters[name]) for name, average in self._average.items()]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _precise(parameter: nn.Parameter) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)


def _shapes(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _require_same(own: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> None:
    differing = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if differing:
        raise ValueError(
            f"expected the trainable parameters that are averaged, by name and shape; got others at {differing[:3]}; "
            "freeze and unfreeze before Averaged(model), and load into the same architecture"
        )
