# SPDX-License-Identifier: Apache-2.0
"""The run that is open on a model: how to end it where nothing else of it is left, as after a notebook cell was run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import nn


class OpenRun:
    """A hook on the model of a run, which does nothing but tell how to `end` the run; it knows a copy of its model."""

    def __init__(self, model: nn.Module, end: Callable[[], None]) -> None:
        self.model = model
        self.end = end

    def __call__(self, module: nn.Module, args: object) -> None:
        """Nothing."""

    def __deepcopy__(self, memo: dict[int, object]) -> OpenRun:
        """Itself, on a model that it is not of."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refused: the run holds private sums, and a ledger that has one writer."""
        raise TypeError(
            "expected a model without an open run to pickle; got one whose run is open, and holds private sums; save "
            "model.state_dict(), or end the run first: engine.detach(), or leave its `with` statement"
        )


def open_runs(model: nn.Module) -> list[OpenRun]:
    """The runs that are open on any module of `model`."""
    hooks = [(module, hook) for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for module, hook in hooks if isinstance(hook, OpenRun) and hook.model is module]


def refuse_open(model: nn.Module) -> None:
    """Raise RuntimeError where a run is open on `model` or a part of it."""
    if open_runs(model):
        raise RuntimeError(
            "expected a model without an open run; got one of a run that has not ended, as where a notebook cell is run "
            "again; end that run by engine.detach(), or by dpopt.detach(model) where its engine is lost"
        )


def detach(model: nn.Module) -> None:
    """End every run that is open on `model`: no hook stays, its ledger is closed, what was not released is dropped.

    For a run whose engine is lost: put it at the top of a notebook cell that is run again. It does nothing where no run
    is open, and `model` keeps its weights. The ledger stays on disk, with all that was charged: give its path to
    the next run on the same records.

        dpopt.detach(model)
        model, optimizer, loader = PrivacyEngine(ledger="run.jsonl").make_private(module=model, ...)
    """
    for run in open_runs(model):
        run.end()
