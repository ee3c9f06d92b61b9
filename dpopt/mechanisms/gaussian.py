# SPDX-License-Identifier: Apache-2.0
"""The Gaussian mechanism on a clipped sum that carries its own sensitivity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from accountants import Event, Gaussian
from clipping import ClippedSum
from dpopt.public_numbers import check_real
from dpopt.randomness import normals, philox
from dpopt.randomness.cipher import CipherKey

NoiseSource = Callable[[str, torch.device], torch.Generator | CipherKey]
"""(parameter name, device) -> a generator, or the key of a cipher's stream, that no other query uses."""

_SCRATCH = 1 << 16
_DEVICE_SCRATCH = 1 << 24


class Mechanism(Protocol):
    """One private release of a clipped sum."""

    def event(self) -> Event:
        """What one release costs, at sensitivity 1."""
        ...

    def check(self, sensitivities: Sequence[float], sizes: Sequence[int]) -> None:
        """Raise ValueError for a sum of such groups (sensitivity, number of coordinates) that it cannot release."""
        ...

    def release(self, clipped: ClippedSum, noise: NoiseSource, divisor: float = 1.0) -> dict[str, Tensor]:
        """The noisy sum divided by a public constant. Takes over the tensors of `clipped`."""
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
        check_real("noise_multiplier", self.noise_multiplier)
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(
                f"expected a finite noise_multiplier >= 0; got {self.noise_multiplier}; calibrate it with "
                "dpopt.noise_multiplier(epsilon=, delta=, sampling_rate=, steps=)"
            )

    def event(self) -> Event:
        """`Gaussian(noise_multiplier)`."""
        return Gaussian(self.noise_multiplier)

    def check(self, sensitivities: Sequence[float], sizes: Sequence[int]) -> None:
        """Every sum can be released."""

    def stds(self, sensitivities: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
        """The standard deviation of the noise in each group: the same."""
        return (self.noise_multiplier * math.hypot(*sensitivities),) * len(sensitivities)

    def release(self, clipped: ClippedSum, noise: NoiseSource, divisor: float = 1.0) -> dict[str, Tensor]:
        """The noisy sum over `divisor`, in the tensors of `clipped`."""
        # Parameters in another memory format (channels_last) have sums in it too.
        released = {name: total.contiguous() for name, total in clipped.total.items()}
        if self.noise_multiplier == 0:
            return {name: total.div_(divisor) for name, total in released.items()}
        std = self.noise_multiplier * clipped.sensitivity
        for name, total in released.items():
            add_normal(total, std, noise(name, total.device), divisor)
        return released


def add_normal(total: Tensor, std: float, source: torch.Generator | CipherKey, divisor: float = 1.0) -> None:
    """Add independent normal noise to every element of the contiguous `total`, and divide by a constant.

    Through a small scratch: the sum is read and written once, while a part of it is in the cache.
    """
    if isinstance(source, CipherKey):
        normals.add_normal(total, std, source, divisor)
        return
    if philox.serves(total):  # the generator is this query's own, and with it the key of its stream
        philox.add_normal(total, std, source.initial_seed(), stream=0, factor=1 / divisor)
        return
    flat = total.view(-1)
    scratch_size = _SCRATCH if total.device.type == "cpu" else _DEVICE_SCRATCH
    scratch = torch.empty(min(scratch_size, flat.numel()), dtype=total.dtype, device=total.device)
    for start in range(0, flat.numel(), scratch_size):
        part = flat[start : start + scratch_size]
        part.add_(scratch[: part.numel()].normal_(0.0, std, generator=source))
        if divisor != 1.0:
            part.div_(divisor)
