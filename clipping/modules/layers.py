# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are recorded, under which rule, and which parameters each of them explains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from clipping.gradients.sample_grads import SampleGrads
from clipping.rules import Entry, rule_for
from clipping.rules.registry import is_folding


class Layer(NamedTuple):
    """A module whose forward is recorded.

    `rule` is None for the generic rule, which covers the module's own code, or its whole subtree. `names` maps the
    module's own parameter names to the model's canonical ones (tied parameters share one). `members` are the
    modules whose parameters are detached while the forward runs. `fold` is the block around it that folds
    positions into the batch. `inlined` are modules below one without a rule whose code counts as its own.
    """

    name: str
    module: nn.Module
    rule: Entry | None
    names: dict[str, str]
    members: tuple[nn.Module, ...]
    fold: nn.Module | None = None
    inlined: tuple[nn.Module, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the record of this module explains everything below it."""
        return self.rule is None or self.rule.whole


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
    return any(_is_inlined(name, child) and _holds(child) for name, child in module.named_children())


def _is_inlined(name: str, child: nn.Module) -> bool:
    """Whether what a child holds is used by its parent's code: it has no forward, or serves all examples at once."""
    if name == "parametrizations" or isinstance(child, nn.ParameterList | nn.ParameterDict):
        return True
    if isinstance(child, nn.ModuleDict) and len(child) > 0:
        return all(_is_inlined(key, below) for key, below in child.items())
    return type(child).__name__ in _PROMPTS and type(child).__module__.startswith("peft.")


_PROMPTS = ("PromptEmbedding", "PromptEncoder")
"""Their output, one for the whole batch, is repeated for each example by the model around them."""


def _visit(
    module: nn.Module, prefix: str, canonical: dict[int, str], seen: set[int], fold: nn.Module | None = None
) -> Iterator[Layer]:
    if id(module) in seen or not _holds(module):
        return
    seen.add(id(module))
    entry = rule_for(module)
    whole = entry is not None and entry.whole
    if not whole and not _owns(module):
        fold = module if is_folding(module) else fold
        for name, child in module.named_children():
            yield from _visit(child, f"{prefix}.{name}" if prefix else name, canonical, seen, fold)
        return
    rule = entry if whole or not any(_holds(child) for child in module.children()) else None
    whole = whole or rule is None
    members = tuple(module.modules()) if whole else (module,)
    named = module.named_parameters(recurse=whole, remove_duplicate=False)
    names = {name: canonical[id(p)] for name, p in named if p.requires_grad}
    apart = [] if rule is not None else [x for x in module.named_children() if not _is_inlined(*x)]
    inlined = [] if rule is not None else [x for name, x in module.named_children() if _is_inlined(name, x)]
    below = tuple(x for child in inlined for x in child.modules())
    yield Layer(prefix, module, rule, names, members, fold, below)
    for name, child in apart:
        yield from _visit(child, f"{prefix}.{name}" if prefix else name, canonical, seen, fold)


def recorded_layers(model: nn.Module) -> tuple[Layer, ...]:
    """The layers of `model` to record, outermost first; every trainable parameter belongs to one of them.

    Parameters are known by their first name in `model.named_parameters()`, so tied ones share a name.
    """
    canonical = {id(p): name for name, p in model.named_parameters()}
    layers = tuple(_visit(model, "", canonical, set()))
    return layers


def understood(layer: Layer, found: dict[str, SampleGrads], num_examples: int) -> dict[str, SampleGrads]:
    """What a rule returned for the layer's trainable parameters; raises ValueError where it cannot be meant.

    A misspelt name would train nothing, and rows that are not the examples would be clipped as if they were.
    """
    shapes = {name: p.shape for name, p in layer.module.named_parameters(remove_duplicate=False)}
    for name, grads in found.items():
        if name not in shapes or grads.num_examples != num_examples or grads.shape != shapes[name]:
            raise ValueError(
                f"expected the rule of layer {layer.name or 'model'!r} to return gradients of {sorted(shapes)} for "
                f"{num_examples} examples; got {name!r} with {grads.num_examples} examples of "
                f"{tuple(grads.shape)}; return {{parameter name: (B, *shape of the parameter)}}"
            )
    missing = sorted(set(layer.names) - set(found))
    if missing and not layer.whole:
        raise ValueError(
            f"expected the rule of layer {layer.name or 'model'!r} to return gradients of {sorted(layer.names)}; got "
            f"none of {missing}; return them, or freeze these parameters"
        )
    if found.keys() <= layer.names.keys():
        return found
    return {name: grads for name, grads in found.items() if name in layer.names}


def entries(model: nn.Module, layers: Sequence[Layer]) -> dict[nn.Module, str]:
    """Where a forward may begin, by name: the model, and its parts of up to two levels below that hold recorded layers.

    Models of two towers are called by their parts.
    """
    recorded = {id(layer.module) for layer in layers}
    found = {model: ""}
    for name, module in model.named_modules():
        is_part = (
            name.count(".") < 2 and id(module) not in recorded and next(module.children(), None) is not None
        )
        if is_part and not isinstance(module, nn.ModuleList | nn.ModuleDict) and _holds(module):
            found.setdefault(module, name)
    return found
