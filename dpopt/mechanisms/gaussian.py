# SPDX-License-Identifier: Apache-2.0
"""The Gaussian mechanism on a clipped sum that carries its own sensitivity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from accountants import Event, Gaussian
from clipping import ClippedSum

NoiseSource = Callable[[str, torch.device], torch.Generator]
"""(parameter name, device) -> a generator that no other query uses."""

_SCRATCH = 1 << 16


class Mechanism(Protocol):
    """One private release of a clipped sum."""

    def event(self) -> Event:
        """What one release costs, at sensitivity 1."""
        ...

    def release(self, clipped: ClippedSum, noise: NoiseSource) -> dict[str, Tensor]:
        """The noisy sum. Takes over the tensors of `clipped`, which must not be read again."""
        ...


@dataclass(frozen=True, slots=True)
class GaussianMechanism:
    """Adds normal noise of standard deviation noise_multiplier * sensitivity to every coordinate.

    A noise_multiplier of 0 adds none, for debugging; its event costs epsilon = infinity.

    Guarantees
    ----------
    One release is the Gaussian mechanism of the event, since the sum's Euclidean sensitivity divided by the
    noise's standard deviation is 1 / noise_multiplier (Dwork and Roth 2014, theorem A.1; exact curve: Balle
    and Wang 2018, arXiv:1805.06530, theorem 8). Noise is drawn and added in the sum's own precision, float32
    or float64, whatever the model's dtype (test_guarantee_noise_has_the_stated_scale).
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(
                f"expected a finite noise_multiplier >= 0; got {self.noise_multiplier}; calibrate it with "
                "dpopt.noise_multiplier(epsilon=, delta=, sampling_rate=, steps=)"
            )

    def event(self) -> Event:
        """`Gaussian(noise_multiplier)`."""
        return Gaussian(self.noise_multiplier)

    def release(self, clipped: ClippedSum, noise: NoiseSource) -> dict[str, Tensor]:
        """The noisy sum, in the tensors of `clipped`."""
        # Parameters in another memory format (channels_last) have sums in it too.
        released = {name: total.contiguous() for name, total in clipped.total.items()}
        if self.noise_multiplier == 0:
            return released
        std = self.noise_multiplier * clipped.sensitivity
        for name, total in released.items():
            add_normal(total, std, noise(name, total.device))
        return released


def add_normal(total: Tensor, std: float, generator: torch.Generator) -> None:
    """Add independent normal noise to every element of the contiguous `total`, through a small scratch."""
    flat = total.view(-1)
    scratch = torch.empty(min(_SCRATCH, flat.numel()), dtype=total.dtype, device=total.device)
    for start in range(0, flat.numel(), _SCRATCH):
        part = flat[start : start + _SCRATCH]
        part.add_(scratch[: part.numel()].normal_(0.0, std, generator=generator))
