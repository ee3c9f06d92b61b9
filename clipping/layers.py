# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are recorded, under which rule, and which parameters each of them explains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from clipping.rules import Rule, rule_for


class Layer(NamedTuple):
    """A module whose forward is recorded.

    `rule` is None for the generic rule, which then covers the module's whole subtree. `names` maps the
    module's own parameter names to the model's canonical ones (tied parameters share one). `members` are the
    modules whose parameters are detached while the forward runs.
    """

    name: str
    module: nn.Module
    rule: Rule | None
    names: dict[str, str]
    members: tuple[nn.Module, ...]


def _holds(module: nn.Module) -> bool:
    """Whether a trainable parameter lies anywhere below `module`."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _owns(module: nn.Module) -> bool:
    """Whether `module` itself uses a trainable parameter: its own, or one in a container without a forward.

    An alias of a descendant's parameter (opacus' recurrent layers rename their cells') is the descendant's.
    """
    below = {id(p) for child in module.children() for p in child.parameters()}
    if any(p is not None and p.requires_grad and id(p) not in below for p in module._parameters.values()):
        return True
    if "parametrizations" in module._modules:
        return _holds(module)
    containers = (nn.ParameterList, nn.ParameterDict)
    return any(isinstance(child, containers) and _holds(child) for child in module.children())


def _visit(module: nn.Module, prefix: str, canonical: dict[int, str], seen: set[int]) -> Iterator[Layer]:
    if id(module) in seen or not _holds(module):
        return
    seen.add(id(module))
    if not _owns(module):
        for name, child in module.named_children():
            yield from _visit(child, f"{prefix}.{name}" if prefix else name, canonical, seen)
        return
    rule = None if any(_holds(child) for child in module.children()) else rule_for(module)
    members = (module,) if rule is not None else tuple(module.modules())
    named = module.named_parameters(recurse=rule is None, remove_duplicate=False)
    names = {name: canonical[id(p)] for name, p in named if p.requires_grad}
    yield Layer(prefix, module, rule, names, members)


def recorded_layers(model: nn.Module) -> tuple[Layer, ...]:
    """The layers of `model` to record, outermost first; every trainable parameter belongs to one of them.

    Parameters are known by their first name in `model.named_parameters()`, so tied ones share a name.
    """
    canonical = {id(p): name for name, p in model.named_parameters()}
    layers = tuple(_visit(model, "", canonical, set()))
    return layers
