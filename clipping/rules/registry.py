# SPDX-License-Identifier: Apache-2.0
"""Which rule serves which layer, decided by the class that *defines* the layer's forward.

A subclass that does not override `forward` (peft's, opacus' `RNNLinear`) keeps its parent's rule; one that
does override it falls to the generic rule, which differentiates the forward as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from clipping.gradients.sample_grads import SampleGrads


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

    def named(self, layer: nn.Module) -> dict[str, object]:
        """Every argument of `layer.forward` by its name, defaults filled in."""
        bound = inspect.signature(layer.forward).bind(*self.args, **dict(self.kwargs))
        bound.apply_defaults()
        return dict(bound.arguments)


Rule = Callable[[nn.Module, Inputs, Tensor], dict[str, SampleGrads]]
"""(layer, inputs, output gradient with B rows) -> gradients by the layer's own parameter names."""

WholeRule = Callable[[nn.Module, Inputs, Sequence[Tensor | None]], dict[str, SampleGrads]]
"""The same with one output gradient, or None, for each floating-point output, as the layer returned them."""

BatchDims = Callable[[nn.Module, Inputs, Sequence[Tensor]], tuple[int, ...]]
"""(layer, inputs, floating-point outputs) -> the batch dimension of each output; raises where it cannot serve."""

_AnyRule = TypeVar("_AnyRule", bound=Callable[..., dict[str, SampleGrads]])


class Entry(NamedTuple):
    """A rule and the parameters it covers; `batch_dims` is given where it covers the module's whole subtree."""

    function: Callable[..., dict[str, SampleGrads]]
    parameters: tuple[str, ...]
    batch_dims: BatchDims | None

    @property
    def whole(self) -> bool:
        """Whether the rule explains the parameters of the module's children too."""
        return self.batch_dims is not None

    def covers(self, layer: nn.Module) -> bool:
        """Whether every parameter that the layer uses is known to the rule."""
        owned = [name for name, _ in layer.named_parameters(recurse=self.whole, remove_duplicate=False)]
        return all(any(fnmatchcase(name, pattern) for pattern in self.parameters) for name in owned)


_FOLDING: set[type[nn.Module] | str] = set()
_BY_CLASS: dict[type[nn.Module], Entry] = {}
_BY_NAME: dict[str, Entry] = {}


def rule(
    *layers: type[nn.Module] | str,
    parameters: tuple[str, ...] = ("weight", "bias"),
    batch_dims: BatchDims | None = None,
) -> Callable[[_AnyRule], _AnyRule]:
    """Make the decorated function the rule of `layers`: classes, or qualified names ("package.module.Class").

    The function takes the layer, the `Inputs` of one call and the gradient of its output, both with the batch
    in dimension 0, and returns the gradient of each parameter for each example::

        class Scale(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(8))

            def forward(self, x):
                return x * self.scale

        @clipping.rule(Scale, parameters=("scale",))
        def scale(layer, inputs, grad):
            return {"scale": clipping.Dense(grad * inputs.first)}

    It must be exact, and must not let one example's rows reach another's. Names of frozen parameters may be
    left out or returned; they are ignored.

    `parameters` are the names, or patterns of names ("weight_*"), that the rule covers: a layer that owns
    others falls to the generic rule. The name form lets a rule serve a library that is not installed.

    `batch_dims` is for layers with several outputs, with parameters in children they do not call, or with a
    batch dimension of their own: it tells, at each call, the batch dimension of each floating-point output,
    or raises where the call cannot be served. The rule then covers the whole subtree and takes the inputs as
    they came and a tuple with a gradient or None for each floating-point output.
    """
    entry_parameters = tuple(parameters)

    def register(function: _AnyRule) -> _AnyRule:
        entry = Entry(function, entry_parameters, batch_dims)
        for layer in layers:
            if isinstance(layer, str):
                _BY_NAME[layer] = entry
            else:
                _BY_CLASS[layer] = entry
        return function

    return register


def batch_first(_: nn.Module, inputs: Inputs, outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """`batch_dims` of layers that define dimension 0 as the batch, whatever the model around them does."""
    return (0,) * len(outputs)


def folds(*blocks: type[nn.Module] | str) -> None:
    """Declare blocks (B, T, D) whose layers see rows (B * T, D) in the order of `view(-1, D)`, and all of them."""
    _FOLDING.update(blocks)


def is_folding(block: nn.Module) -> bool:
    """Whether the class that defines the forward of `block` was declared by `folds`."""
    cls = _definer(block)
    return cls is not None and (cls in _FOLDING or f"{cls.__module__}.{cls.__qualname__}" in _FOLDING)


def require_dims(layer: nn.Module, inputs: Inputs, num_dims: int) -> None:
    """Raise ValueError where a layer that also takes a single example was called without a batch."""
    if inputs.first.dim() != num_dims:
        raise ValueError(
            f"expected inputs of {num_dims} dimensions, the batch first, at {type(layer).__name__}; got "
            f"{tuple(inputs.first.shape)}, one example without a batch; call it with unsqueeze(0)"
        )


def trainable(layer: nn.Module, name: str) -> bool:
    """Whether the layer has a parameter `name`, a dotted path, that requires a gradient."""
    *path, last = name.split(".")
    for part in path:
        layer = layer.get_submodule(part)
    parameter = layer._parameters.get(last)
    return parameter is not None and parameter.requires_grad


def _definer(layer: nn.Module) -> type | None:
    for cls in type(layer).__mro__:
        if "forward" in vars(cls):
            return cls
    return None


def rule_for(layer: nn.Module) -> Entry | None:
    """The rule registered for `layer`, or None where only the generic rule can serve it."""
    if "forward" in vars(layer):  # somebody patched this instance: its class says nothing about it
        return None
    cls = _definer(layer)
    if cls is None:
        return None
    entry = _BY_CLASS.get(cls) or _BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
    return entry if entry is not None and entry.covers(layer) else None
