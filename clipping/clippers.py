# SPDX-License-Identifier: Apache-2.0
"""Clippers: from the norms of each example's gradient to the weight with which it enters the sum.

The law of this file: with `weights = clipper.weights(norms)`, the weighted gradients of one example, taken
over all groups together, have Euclidean norm at most `clipper.sensitivity`. A non-finite norm gets weight 0.

Shapes: K groups of parameters, B examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Clipper(Protocol):
    """What a private sum needs to know of a clipping rule."""

    @property
    def sensitivity(self) -> float:
        """Most that adding or removing one example moves the clipped sum, in Euclidean norm."""
        ...

    def groups(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """K groups that partition the parameter names; one norm per group and example."""
        ...

    def weights(self, norms: Tensor) -> Tensor:
        """(K, B) norms to (K, B) weights, finite and non-negative."""
        ...


def _check_clip_norm(clip_norm: float) -> None:
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(
            f"expected a finite clip_norm > 0; got {clip_norm}; choose the norm beyond which one example's "
            "gradient is scaled down (1.0 is a usual start)"
        )


def _scale_down(norms: Tensor, clip_norms: Sequence[float]) -> Tensor:
    bounds = torch.tensor(clip_norms, dtype=norms.dtype, device=norms.device).unsqueeze(1)
    weights = bounds / torch.maximum(norms, bounds)
    # A weight below the smallest normal number is rounded by a tenth and more, up as well as down.
    keep = torch.isfinite(norms).all(0) & (weights >= torch.finfo(norms.dtype).tiny)
    return torch.where(keep, weights, torch.zeros_like(weights))


@dataclass(frozen=True, slots=True)
class FlatClipper:
    """Clips the whole gradient of an example: g -> g * min(1, clip_norm / |g|).

    Guarantees
    ----------
    Sensitivity under adding or removing one example is `clip_norm`: |g * min(1, C / |g|)| <= C.
    Source: Abadi et al. (2016), arXiv:1607.00133, algorithm 1.
    """

    clip_norm: float

    def __post_init__(self) -> None:
        _check_clip_norm(self.clip_norm)

    @property
    def sensitivity(self) -> float:
        """`clip_norm`."""
        return self.clip_norm

    def groups(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """One group of all parameters."""
        return (tuple(names),)

    def weights(self, norms: Tensor) -> Tensor:
        """(1, B) norms to (1, B) weights."""
        return _scale_down(norms, (self.clip_norm,))


@dataclass(frozen=True, slots=True)
class GroupClipper:
    """Clips each group of parameters by its own norm: per layer, per block or per parameter.

    Guarantees
    ----------
    Sensitivity is sqrt(sum_k clip_norms[k]^2), since the groups partition the coordinates of the gradient.
    Source: McMahan et al. (2018), arXiv:1710.06963, section 2 (per-layer clipping).
    """

    members: tuple[tuple[str, ...], ...]
    clip_norms: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.members) != len(self.clip_norms):
            raise ValueError(
                f"expected one clip norm per group, {len(self.members)} of them; got {len(self.clip_norms)}; "
                "give the list in the order of the groups"
            )
        for clip_norm in self.clip_norms:
            _check_clip_norm(clip_norm)

    @property
    def sensitivity(self) -> float:
        """sqrt(sum_k clip_norms[k]^2)."""
        return math.sqrt(math.fsum(bound * bound for bound in self.clip_norms))

    def groups(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """The groups given, after checking that they partition `names`."""
        listed = [name for group in self.members for name in group]
        if sorted(listed) != sorted(names):
            odd = sorted(set(listed) ^ set(names)) or sorted({n for n in listed if listed.count(n) > 1})
            raise ValueError(
                f"expected groups that hold each trainable parameter once; got a difference at {odd[:5]}; "
                "build the clipper with per_layer(model, ...) or per_parameter(model, ...) after freezing"
            )
        return self.members

    def weights(self, norms: Tensor) -> Tensor:
        """(K, B) norms to (K, B) weights; an example that is non-finite in one group is dropped from all."""
        return _scale_down(norms, self.clip_norms)


def per_layer(model: torch.nn.Module, clip_norm: float) -> GroupClipper:
    """A `GroupClipper` with one group per layer and equal shares, of total sensitivity `clip_norm`."""
    _check_clip_norm(clip_norm)
    layers: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    share = clip_norm / math.sqrt(max(1, len(layers)))
    return GroupClipper(tuple(tuple(names) for names in layers.values()), (share,) * len(layers))


def per_parameter(model: torch.nn.Module, clip_norms: Sequence[float]) -> GroupClipper:
    """A `GroupClipper` with one group per trainable parameter, in the order of `named_parameters()`."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return GroupClipper(tuple((name,) for name in names), tuple(float(c) for c in clip_norms))
