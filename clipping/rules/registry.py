# SPDX-License-Identifier: Apache-2.0
"""Which rule serves which layer, decided by the class that *defines* the layer's forward.

A subclass that does not override `forward` (peft's, opacus' `RNNLinear`) keeps its parent's rule; one that
does override it falls to the generic rule, which differentiates the forward as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from clipping.grads import SampleGrads


class Inputs(NamedTuple):
    """The arguments of one forward call; tensors whose first dimension is the batch have B rows."""

    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    @property
    def first(self) -> Tensor:
        """The first tensor, positional or by keyword: the input of every one-input layer."""
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor):
                return value
        raise TypeError("expected a layer called with a tensor; got none; pass the input as an argument")


Rule = Callable[[nn.Module, Inputs, Tensor], dict[str, SampleGrads]]
"""(layer, inputs, output gradient with B rows) -> gradients by the layer's own parameter names."""


class _Entry(NamedTuple):
    rule: Rule
    parameters: frozenset[str]


_BY_CLASS: dict[type[nn.Module], _Entry] = {}
_BY_NAME: dict[str, _Entry] = {}


def register_rule(
    layer: type[nn.Module] | str, rule: Rule, *, parameters: tuple[str, ...] = ("weight", "bias")
) -> None:
    """Make `rule` serve `layer`, a class or the qualified name of one ("package.module.Class").

    `parameters` are the names the rule covers: a layer that owns others falls to the generic rule. The name
    form lets a rule serve a library that is not installed.
    """
    entry = _Entry(rule, frozenset(parameters))
    if isinstance(layer, str):
        _BY_NAME[layer] = entry
    else:
        _BY_CLASS[layer] = entry


def _definer(layer: nn.Module) -> type | None:
    for cls in type(layer).__mro__:
        if "forward" in vars(cls):
            return cls
    return None


def rule_for(layer: nn.Module) -> Rule | None:
    """The rule registered for `layer`, or None where only the generic rule can serve it."""
    if "forward" in vars(layer):  # somebody patched this instance: its class says nothing about it
        return None
    cls = _definer(layer)
    if cls is None:
        return None
    entry = _BY_CLASS.get(cls) or _BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
    if entry is None:
        return None
    owned = {name for name, parameter in layer._parameters.items() if parameter is not None}
    return entry.rule if owned <= entry.parameters else None
