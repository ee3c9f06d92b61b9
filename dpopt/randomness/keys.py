# SPDX-License-Identifier: Apache-2.0
"""Randomness that is secret by default: generators keyed by 256 bits of the operating system.

One key serves one run; every use names its domain (noise of step 7 of parameter "head.weight"), and the state
of each generator is SHAKE-256 of key and domain, so no two queries share a stream and no stream tells
another. On CPU the whole state of the Mersenne twister is keyed (torch's own seeding reaches 32 bits of it);
on CUDA the generator takes 64 bits.

Noise on the CPU takes a cipher instead where there is one (`dpopt.randomness.normals`).

Limits: these are fast statistical generators, not ciphers. Somebody who sees enough *exact* noise values of
one tensor of one step could predict the rest of that tensor's noise in that step, and floating-point noise
is not the ideal Gaussian. Both belong to the report's assumptions. `dpopt.release.randomness_tiers` has the tier without them.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass

import numpy as np
import torch

_WORDS = 624
_STATE_OFFSET = 24
_PROBE_SEED = 0x5EED


@dataclass(frozen=True, slots=True, repr=False)
class RandomKey:
    """The root of a run's randomness; never stored, logged, shown or copied."""

    secret: bytes

    def __repr__(self) -> str:
        return "RandomKey(<hidden>)"

    def __reduce__(self) -> str:
        raise TypeError(
            "expected a key to stay in the run that made it; got a copy or a pickle of it, which would repeat the "
            "noise; start a run of its own"
        )


def secret_key() -> RandomKey:
    """A fresh key: 256 bits from the operating system."""
    return RandomKey(os.urandom(32))


def insecure_key(insecure_seed: int) -> RandomKey:
    """A key that anybody who knows the seed can rebuild: for tests and debugging, no privacy at all."""
    return RandomKey(hashlib.sha256(f"insecure:{insecure_seed}".encode()).digest())


def _material(key: RandomKey, domain: tuple[str | int, ...], length: int) -> bytes:
    hasher = hashlib.shake_256(key.secret)
    for part in domain:
        data = repr(part).encode()
        hasher.update(struct.pack("<Q", len(data)) + data)
    return hasher.digest(length)


def subkey(key: RandomKey, *domain: str | int) -> bytes:
    """256 bits for a cipher, of a domain that no generator has."""
    return _material(key, ("cipher", *domain), 32)


def _cpu_generator(material: bytes) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(_PROBE_SEED)
    state = generator.get_state().numpy().copy()
    words = state[_STATE_OFFSET : _STATE_OFFSET + 8 * _WORDS].view(np.uint64)
    if int(words[0]) != _PROBE_SEED:
        raise RuntimeError(
            "expected torch's CPU generator state to hold 624 words from byte 24 on; got another layout in torch "
            f"{torch.__version__}; use a release of torch that dpopt lists as tested"
        )
    words[:] = np.frombuffer(material, dtype="<u4").astype(np.uint64)
    generator.set_state(torch.from_numpy(state))
    return generator


def generator(key: RandomKey, *domain: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one domain of `key`; the same domain gives the same stream."""
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu_generator(_material(key, domain, 4 * _WORDS))
    (seed,) = struct.unpack("<Q", _material(key, domain, 8))
    return torch.Generator(device=device).manual_seed(seed >> 1)


def fair_coins(key: RandomKey, count: int, *domain: str | int) -> np.ndarray:
    """(count,) booleans: independent fair coins, bits of SHAKE-256 of key and domain."""
    material = _material(key, ("coins", *domain), -(-count // 8))
    return np.unpackbits(np.frombuffer(material, dtype=np.uint8), count=count).astype(bool)
