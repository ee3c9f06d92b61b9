# SPDX-License-Identifier: Apache-2.0
"""The tiers of randomness: what draws the batches and the noise of a run, and how close to the proof it comes.

| tier | batches | noise | assumed |
|---|---|---|---|
| fast | float64 uniforms of a keyed Mersenne twister | floats added to float sums | the generator; floats as reals |
| secure | exact, AES-256 | whole cells on a grid, exact, AES-256 | AES-256; a bound on the rounding of float sums |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from clipping import ClippedSum
from dpopt.mechanisms.gaussian import Mechanism
from dpopt.mechanisms.grid_gaussian import ROUNDING, gridded, summation_rounding
from dpopt.randomness import normals
from dpopt.randomness.cipher import CipherKey, cipher_key, require_cryptography
from dpopt.randomness.keys import RandomKey, generator, insecure_key, secret_key
from dpopt.sampling.exact_draws import draw, refuse_inexact
from dpopt.sampling.sampler import Sampling


class Tier(Protocol):
    """Everything random in a run."""

    @property
    def key(self) -> RandomKey:
        """The root of it."""
        ...

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a bound on this run stands on, beyond its accountant's."""
        ...

    def check(
        self,
        mechanism: Mechanism,
        sampling: Sampling,
        sensitivities: Sequence[float] = (),
        sizes: Sequence[int] = (),
    ) -> None:
        """Refuse what this tier cannot release or draw, or a machine without what it needs.

        `sensitivities` and `sizes` are those of the groups of the sums to come; none: sums are not looked at.
        """
        ...

    def draw(self, sampling: Sampling, num_records: int, number: int, step: int = 0) -> list[int]:
        """Indices of the batch of `step` of round `number`."""
        ...

    def release(
        self, mechanism: Mechanism, clipped: ClippedSum, charge: int, divisor: float
    ) -> dict[str, Tensor]:
        """The release paid by charge number `charge`. Takes over the tensors of `clipped`."""
        ...


@dataclass(frozen=True, slots=True)
class FastTier:
    """Floating-point noise: on the CPU from a cipher where `normals.available()`, else from torch's generators.

    Both are keyed by 256 secret bits.
    """

    key: RandomKey

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Of floats and of generators."""
        cipher = "AES-256 in counter mode on the CPU, a statistical generator elsewhere, each"
        by = cipher if normals.available() else "a statistical generator"
        return (f"noise drawn in floating point by {by} with a secret key",)

    def check(
        self,
        mechanism: Mechanism,
        sampling: Sampling,
        sensitivities: Sequence[float] = (),
        sizes: Sequence[int] = (),
    ) -> None:
        """Refuse a mechanism that cannot release such sums."""
        if sensitivities:
            mechanism.check(sensitivities, sizes)

    def draw(self, sampling: Sampling, num_records: int, number: int, step: int = 0) -> list[int]:
        """Indices of the batch of `step` of round `number`."""
        return sampling.draw(num_records, generator(self.key, "sampling", number), step)

    def release(
        self, mechanism: Mechanism, clipped: ClippedSum, charge: int, divisor: float
    ) -> dict[str, Tensor]:
        """The release of `mechanism` itself."""
        return mechanism.release(clipped, partial(self.noise, charge), divisor)

    def noise(self, charge: int, name: str, device: torch.device) -> torch.Generator | CipherKey:
        """What draws the noise of one parameter, paid by charge number `charge`."""
        if device.type == "cpu" and normals.available():
            return cipher_key(self.key, "noise", charge, name)
        return generator(self.key, "noise", charge, name, device=device)


@dataclass(frozen=True, slots=True)
class SecureTier:
    """A cipher, exact draws, and exact noise on a grid; `rounding` as in `GridGaussianMechanism`.

    Guarantees
    ----------
    Draws have exactly the law that their sampler charges, and releases are `GridGaussianMechanism`'s, whose event
    is the mechanism's own. No key of the cipher serves two draws, two charges or two parameters.
    """

    key: RandomKey
    rounding: float = ROUNDING
    most: int | None = None
    """The number of examples of a batch up to which `rounding` was computed; None: it was given."""

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Of the cipher and of sums in floats."""
        held = ""
        if self.most is not None:
            held = (
                f" (proven, in any order, for batches of at most {self.most} examples whose terms do not cancel within "
                "an example)"
            )
        return (
            "AES-256 in counter mode, keyed by the operating system, is indistinguishable from random bits",
            f"rounding in floating-point sums adds at most {self.rounding:.2g} of the sensitivity{held}; as much more "
            "noise pays for it",
        )

    def check(
        self,
        mechanism: Mechanism,
        sampling: Sampling,
        sensitivities: Sequence[float] = (),
        sizes: Sequence[int] = (),
    ) -> None:
        """Refuse noise or batches without an exact law here, and a machine without the library `cryptography`."""
        require_cryptography()
        on_grid = gridded(mechanism, self.rounding)
        if sensitivities:
            on_grid.check(sensitivities, sizes)
        refuse_inexact(sampling)

    def noise(self, charge: int) -> Callable[[str, torch.device], CipherKey]:
        """The cipher keys of the noise paid by charge number `charge`."""
        return lambda name, device: cipher_key(self.key, "noise", charge, name)

    def draw(self, sampling: Sampling, num_records: int, number: int, step: int = 0) -> list[int]:
        """Indices of the batch of `step` of round `number`."""
        return draw(sampling, num_records, cipher_key(self.key, "sampling", number).stream(), step)

    def release(
        self, mechanism: Mechanism, clipped: ClippedSum, charge: int, divisor: float
    ) -> dict[str, Tensor]:
        """The release of `mechanism` on a grid."""
        return gridded(mechanism, self.rounding).release(clipped, self.noise(charge), divisor)


NAMES = ("fast", "secure")
"""What `randomness=` takes."""


def tier(name: str, key: RandomKey, most: int | None = None, dtype: torch.dtype = torch.float32) -> Tier:
    """The tier called "fast" or "secure", for sums in `dtype` of at most `most` examples (None: of a usual number).

    The rounding that the secure tier pays for is that of a running sum over `most` examples, the worst of all
    orders: 0.8 % more noise for 256 examples in float32, 13 % for 1024. Where the order of summation is known to be
    better, give a `GridGaussianMechanism` with a rounding of its own.
    """
    if name not in NAMES:
        raise ValueError(f"expected randomness in {NAMES}; got {name!r}; leave it out for the default")
    if name == "fast":
        return FastTier(key)
    if most is None:
        return SecureTier(key)
    return SecureTier(key, max(ROUNDING, summation_rounding(most, most, dtype)), most)


def fresh_tier(
    name: str, insecure_seed: int | None, sampling: Sampling, parameters: Iterable[Tensor]
) -> Tier:
    """The tier called `name` under a new secret key, or the key of a public seed, for a run over `parameters`."""
    key = secret_key() if insecure_seed is None else insecure_key(insecure_seed)
    wide = all(parameter.dtype == torch.float64 for parameter in parameters)
    return tier(name, key, most_examples(sampling), torch.float64 if wide else torch.float32)


def most_examples(sampling: Sampling) -> int:
    """The most examples that a batch holds, or hardly ever exceeds: 6 standard deviations and 20 above the mean."""
    for name in ("max_batch_size", "batch_size"):
        if isinstance(size := getattr(sampling, name, None), int):
            return size
    mean = sampling.expected_batch_size
    return math.ceil(mean + 6 * math.sqrt(mean)) + 20
