# SPDX-License-Identifier: Apache-2.0
"""The Gaussian mechanism with noise of its own scale in each group of parameters.

Group k of K, of sensitivity C_k and d_k coordinates, gets noise of standard deviation s_k. Divided by s_k, every
group has unit noise and sensitivity C_k / s_k, so the whole is one Gaussian mechanism of sensitivity
sqrt(sum_k (C_k / s_k)^2). An allocation says how the groups share the square of that number, the budget:
(C_k / s_k)^2 = share_k / noise_multiplier^2, with shares that sum to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from accountants import Event, Gaussian
from clipping import ClippedSum
from dpopt.mechanisms.gaussian import GaussianMechanism, NoiseSource, add_normal

Allocation = Callable[[Sequence[float], Sequence[int]], Sequence[float]]
"""(sensitivities C_k, numbers of coordinates d_k) -> shares of the budget, > 0, of any common scale."""


def uniform(sensitivities: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
    """The same noise everywhere, as `GaussianMechanism`: shares C_k^2, s_k = noise_multiplier * sensitivity."""
    return tuple(bound * bound for bound in sensitivities)


def equal_budget(sensitivities: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
    """The same share to each group: s_k = noise_multiplier * C_k * sqrt(K)."""
    return (1.0,) * len(sensitivities)


def least_noise(sensitivities: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
    """Shares C_k sqrt(d_k): the least energy of noise sum_k d_k s_k^2 that the budget allows.

    By Cauchy and Schwarz, sum_k d_k s_k^2 * sum_k (C_k / s_k)^2 >= (sum_k C_k sqrt(d_k))^2, with equality where
    s_k^2 is proportional to C_k / sqrt(d_k). Large groups get less noise in each coordinate than small ones.
    """
    return tuple(bound * math.sqrt(max(1, size)) for bound, size in zip(sensitivities, sizes, strict=True))


@dataclass(frozen=True, slots=True)
class GroupGaussianMechanism:
    """Adds normal noise of standard deviation noise_multiplier * C_k / sqrt(share_k) to group k of a clipped sum.

    `noise_multiplier` is that of the whole release, whatever the `allocation`; 0 adds no noise and costs
    epsilon = infinity. Allocations see public numbers only: sensitivities and numbers of coordinates.

    Guarantees
    ----------
    One release is the Gaussian mechanism of the event: sum_k (C_k / s_k)^2 = 1 / noise_multiplier^2, since the
    shares are divided by their sum (test_guarantee_the_charge_covers_the_exact_joint_curve). A sum that does not
    know its groups is refused, and a `ClippedSum` leaves no parameter out of them.
    """

    noise_multiplier: float
    allocation: Allocation = least_noise

    def __post_init__(self) -> None:
        GaussianMechanism(self.noise_multiplier)  # refuses what is no noise multiplier

    def event(self) -> Event:
        """`Gaussian(noise_multiplier)`."""
        return Gaussian(self.noise_multiplier)

    def stds(self, sensitivities: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
        """The standard deviation of the noise in each group."""
        shares = tuple(self.allocation(sensitivities, sizes))
        if len(shares) != len(sensitivities) or not all(math.isfinite(s) and s > 0 for s in shares):
            raise ValueError(
                f"expected {len(sensitivities)} finite shares > 0 of the budget, one for each group; got {shares[:8]}; "
                "correct the allocation"
            )
        whole = math.fsum(shares)
        return tuple(
            self.noise_multiplier * bound * math.sqrt(whole / share)
            for bound, share in zip(sensitivities, shares, strict=True)
        )

    def check(self, sensitivities: Sequence[float], sizes: Sequence[int]) -> None:
        """Raise ValueError where the allocation does not share the budget among these groups."""
        self.stds(sensitivities, sizes)

    def release(self, clipped: ClippedSum, noise: NoiseSource, divisor: float = 1.0) -> dict[str, Tensor]:
        """The noisy sum over `divisor`, in the tensors of `clipped`."""
        if not clipped.groups:
            raise ValueError(
                "expected a clipped sum that knows its groups; got one without; give it groups=sum_groups(clipper, "
                "names), or use GaussianMechanism"
            )
        released = {name: total.contiguous() for name, total in clipped.total.items()}
        if self.noise_multiplier == 0:
            return {name: total.div_(divisor) for name, total in released.items()}
        sizes = [sum(released[name].numel() for name in group.names) for group in clipped.groups]
        stds = self.stds([group.sensitivity for group in clipped.groups], sizes)
        for group, std in zip(clipped.groups, stds, strict=True):
            for name in group.names:
                add_normal(released[name], std, noise(name, released[name].device), divisor)
        return released
