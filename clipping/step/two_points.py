# SPDX-License-Identifier: Apache-2.0
"""Differences of gradients between two points, example by example: both backwards of a part count as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipping.step.step_sum import StepSum


def add_difference(
    step: StepSum,
    losses: Callable[[], Tensor],
    previous: Mapping[str, Tensor],
    keep: Sequence[bool] | Tensor | None = None,
    records: Sequence[int] | None = None,
) -> None:
    """Add, for each example, its gradient at the parameters as they are less that at `previous`, clipped as one.

    `losses` is called twice, with the same random numbers: the masks of dropout are part of the function.
    """
    state = _random_state()
    first = losses()
    if first.shape[0] == 0:
        return
    with step.same_examples(keep, records):
        step.add(first)
        del first
        _set_random_state(state)
        with at(step.parameters, previous):
            step.add(-losses())


@contextmanager
def at(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which `parameters` have other values; finish every backward of its forwards inside."""
    here = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name].to(parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = here[name]


def _random_state() -> tuple[Tensor, list[Tensor]]:
    on_device = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), on_device


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
