# SPDX-License-Identifier: Apache-2.0
"""Clippers for gradients seen from a public centre: the weights of robust means, each with its sensitivity.

With `clipping.gradients.shifted`, the norms are those of g - centre, and centre + sum / batch size is one private step towards
a Huber mean or a geometric median of the gradients. The law is that of `clipping.clippers.whole_gradient`: weight * norm is at most
clip_norm, in floating point too.

Shapes: B examples.

References: Schaipp et al. (2024), arXiv:2402.12828 (medians of gradients by proximal steps); Karimireddy et al.
(2021), arXiv:2012.10333 (centred clipping); Huber (1964), Ann. Math. Statist. 35(1); Weiszfeld (1937).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clipping.clippers.clipper import SHORTEST, check_clip_norm, check_positive, quotient, usable


@dataclass(frozen=True, slots=True)
class HuberClipper:
    """Damps short gradients and clips long ones: g -> g * min(C / (C + mu), C / |g|), with C = clip_norm.

    The proximal step of a Huber loss of width `mu`: g is damped where |g| <= C + mu and clipped beyond. mu = 0 is
    flat clipping; as mu grows, all gradients get the weight C / (C + mu), and the step is towards their mean.

    Guarantees
    ----------
    Sensitivity under adding or removing one example is `clip_norm`: |g| C / |g| = C, and the minimum is no more.
    Source: own derivation from Schaipp et al. (2024), arXiv:2402.12828 (test_guarantee_huber_moves_at_most_the_clip_norm).
    """

    clip_norm: float
    mu: float

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        if not (math.isfinite(self.mu) and self.mu >= 0):
            raise ValueError(
                f"expected a finite mu >= 0; got {self.mu}; 0 clips flat, and the usual distance of a gradient from "
                "the centre damps about half of them"
            )

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
        damping = 1 / (1 + self.mu / self.clip_norm)
        return usable(quotient(self.clip_norm, norms).clamp_max(damping), norms)


@dataclass(frozen=True, slots=True)
class NormalisedClipper:
    """Normalises all but short gradients: g -> g * clip_norm / max(nu, |g|), the weights of Weiszfeld's algorithm.

    Around a public centre, steps along the sum of these approach the geometric median, smoothed within `nu`.
    The step must be a public number: Weiszfeld's own divides by the sum of the weights, which is private.

    Guarantees
    ----------
    Sensitivity under adding or removing one example is `clip_norm`: |g| / max(nu, |g|) <= 1.
    Source: own derivation (test_guarantee_normalised_moves_at_most_the_clip_norm).
    """

    clip_norm: float = 1.0
    nu: float = 0.01

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        check_positive("nu", self.nu, "0.01 is usual, and a smaller one normalises shorter gradients")

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
        lengths = norms.clamp_min(max(self.nu, SHORTEST))
        return usable(quotient(self.clip_norm, lengths), norms)
