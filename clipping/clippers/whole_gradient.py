# SPDX-License-Identifier: Apache-2.0
"""Clippers of the whole gradient as one group: cut it, or normalise it.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clipping.clippers.clipper import SHORTEST, check_clip_norm, check_positive, quotient, usable


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
        check_clip_norm(self.clip_norm)

    @property
    def sensitivity(self) -> float:
        """`clip_norm`."""
        return self.clip_norm

    @property
    def clip_norms(self) -> tuple[float, ...]:
        """`(clip_norm,)`."""
        return (self.clip_norm,)

    def groups(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """One group of all parameters."""
        return (tuple(names),)

    def weights(self, norms: Tensor, group: int = 0) -> Tensor:
        """(B,) norms to (B,) weights."""
        return usable(quotient(self.clip_norm, norms).clamp_max(1), norms)


@dataclass(frozen=True, slots=True)
class AutomaticClipper:
    """Normalises the gradient of an example: g -> g * clip_norm / (|g| + gamma), known as AUTO-S.

    With an optimizer that adapts to the scale of the gradient, such as Adam, `clip_norm` needs no tuning. Short
    gradients are lengthened; `gamma` keeps them from being as long as all others.

    Guarantees
    ----------
    Sensitivity under adding or removing one example is `clip_norm`: C |g| / (|g| + gamma) < C.
    Source: Bu et al. (2022), arXiv:2206.07136, section 4 (their R is 1, gamma 0.01).
    """

    clip_norm: float
    gamma: float = 0.01

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        check_positive("gamma", self.gamma, "0.01 is usual, and a smaller one normalises shorter gradients")

    @property
    def sensitivity(self) -> float:
        """`clip_norm`."""
        return self.clip_norm

    @property
    def clip_norms(self) -> tuple[float, ...]:
        """`(clip_norm,)`."""
        return (self.clip_norm,)

    def groups(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """One group of all parameters."""
        return (tuple(names),)

    def weights(self, norms: Tensor, group: int = 0) -> Tensor:
        """(B,) norms to (B,) weights."""
        lengths = norms + self.gamma
        return usable(quotient(self.clip_norm, lengths.clamp_min(SHORTEST)), norms)


@dataclass(frozen=True, slots=True)
class PerSampleAdaptiveClipper:
    """Normalises all but short gradients: g -> g * clip_norm / (|g| + r / (|g| + r)), known as DP-PSAC.

    As `AutomaticClipper`, but the shortest gradients get a weight of about `clip_norm` instead of
    `clip_norm / gamma`, so that they do not drown the rest.

    Guarantees
    ----------
    Sensitivity under adding or removing one example is `clip_norm`: C |g| / (|g| + r / (|g| + r)) < C.
    Source: Xia et al. (2023), arXiv:2212.00328, algorithm 1.
    """

    clip_norm: float
    r: float = 0.1

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        check_positive("r", self.r, "0.1 is usual, and a smaller one normalises shorter gradients")

    @property
    def sensitivity(self) -> float:
        """`clip_norm`."""
        return self.clip_norm

    @property
    def clip_norms(self) -> tuple[float, ...]:
        """`(clip_norm,)`."""
        return (self.clip_norm,)

    def groups(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """One group of all parameters."""
        return (tuple(names),)

    def weights(self, norms: Tensor, group: int = 0) -> Tensor:
        """(B,) norms to (B,) weights."""
        lengths = norms + self.r / (norms + self.r).clamp_min(SHORTEST)
        return usable(quotient(self.clip_norm, lengths.clamp_min(SHORTEST)), norms)
