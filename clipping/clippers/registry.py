# SPDX-License-Identifier: Apache-2.0
"""The names of ways to clip, for those who choose one in a configuration or on a command line.

"flat", "automatic" and "psac" clip the whole gradient; "per_layer", "per_block" and "per_adapter" clip each group
of parameters by itself, flat or, as in "per_layer:automatic", by another rule. All have sensitivity `clip_norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from clipping.clippers.clipper import Clipper
from clipping.clippers.groups import ClipRule, GroupClipper, per_adapter, per_block, per_layer
from clipping.clippers.whole_gradient import AutomaticClipper, FlatClipper, PerSampleAdaptiveClipper

NamedClipper = Callable[[nn.Module, float], Clipper]
"""(model, clip norm) -> a clipper of that sensitivity."""

RULES: Mapping[str, ClipRule] = {
    "flat": FlatClipper,
    "automatic": AutomaticClipper,
    "psac": PerSampleAdaptiveClipper,
}
PARTITIONS: Mapping[str, Callable[..., GroupClipper]] = {
    "per_layer": per_layer,
    "per_block": per_block,
    "per_adapter": per_adapter,
}


def _whole(rule: ClipRule) -> NamedClipper:
    return lambda model, clip_norm: rule(clip_norm)


def _parts(partition: Callable[..., GroupClipper], rule: ClipRule) -> NamedClipper:
    return lambda model, clip_norm: partition(model, clip_norm, rule=rule)


CLIPPERS: Mapping[str, NamedClipper] = {
    **{name: _whole(rule) for name, rule in RULES.items()},
    **{name: _parts(partition, FlatClipper) for name, partition in PARTITIONS.items()},
    **{
        f"{p}:{r}": _parts(partition, rule)
        for p, partition in PARTITIONS.items()
        for r, rule in RULES.items()
    },
}
"""Every name of a way to clip; `dpopt.estimators` has more names of estimators."""


def check_clipping(name: str) -> None:
    """Raise ValueError for a name that is not in `CLIPPERS`."""
    if name not in CLIPPERS:
        raise ValueError(
            f"expected clipping to be one of {', '.join(CLIPPERS)}; got {name!r}; flat is usual, and the README says "
            "what the others do"
        )


def named_clipper(name: str, model: nn.Module, clip_norm: float) -> Clipper:
    """The clipper of that name, of sensitivity `clip_norm`, for the trainable parameters of `model`."""
    check_clipping(name)
    return CLIPPERS[name](model, clip_norm)
