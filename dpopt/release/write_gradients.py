# SPDX-License-Identifier: Apache-2.0
"""Writing what was released, and nothing else, into `.grad`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

from torch import Tensor, nn


def write_gradients(parameters: dict[str, nn.Parameter], released: Mapping[str, Tensor]) -> None:
    """Set each parameter's `.grad` to what was released, in the parameter's dtype; all of them, or clear them."""
    try:
        written = {name: released[name].to(parameters[name].dtype) for name in parameters}
        for name, parameter in parameters.items():
            parameter.grad = written[name]
    except BaseException:
        # Half of this step and half of an older one are no gradient. Another signal may come while they are cleared.
        while any(parameter.grad is not None for parameter in parameters.values()):
            with suppress(KeyboardInterrupt):
                clear_gradients(parameters.values())
        raise


def times(released: Mapping[str, Tensor], factor: float) -> Mapping[str, Tensor]:
    """Released vectors times a public number; those of 1 as they are."""
    return released if factor == 1 else {name: value * factor for name, value in released.items()}


def clear_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set every `.grad` to None."""
    for parameter in parameters:
        parameter.grad = None
