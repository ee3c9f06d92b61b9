# SPDX-License-Identifier: Apache-2.0
"""Normal noise on the CPU from a cipher: AES-256 in counter mode, transformed by compiled code.

Three times as fast as torch's normal_, whose time goes to its Mersenne twister, and keyed by a cipher besides.
Needs numba and cryptography (the extra `fast`); without them the noise comes from torch.

Shapes: N pairs of normals in a part.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from dpopt.randomness.cipher import CipherKey

PAIRS = 1 << 15
"""Pairs in a part: words, radii and the part of the sum fit into a core's own cache."""


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether numba and cryptography are installed."""
    return find_spec("numba") is not None and find_spec("cryptography") is not None


def add_normal(total: Tensor, std: float, key: CipherKey, divisor: float = 1.0) -> None:
    """Replace the contiguous `total` (on the CPU) by (total + std * normal) / divisor, element by element.

    Guarantees
    ----------
    Every element gets a normal of its own, from words of the stream of `key` that no other element uses; keys of
    different domains give independent streams (see `WordStream`). Uniforms have 32 bits (64 for a float64 total), so
    |normal| reaches 6.76 (9.49); `std` is rounded up to the precision of `total`
    (test_guarantee_compiled_noise_has_the_stated_scale). Arithmetic is floating point, like torch's own noise.
    """
    flat = total.view(-1).numpy()
    if total.dtype == torch.float64:
        _add_in_double(flat, std, key, divisor)
        return
    from dpopt.randomness.box_muller import add_pairs

    scale, factor = _float32_above(std), np.float32(1 / divisor)
    stream = key.stream()
    buffer = np.empty(PAIRS, dtype=np.int64)
    radius = np.empty(PAIRS, dtype=np.float32)
    for start in range(0, flat.size, 2 * PAIRS):
        part = flat[start : start + 2 * PAIRS]
        half = (part.size + 1) // 2
        stream.fill(buffer[:half])
        words, scratch = buffer[:half].view(np.uint32), radius[:half]
        whole = part if part.size == 2 * half else np.append(part, np.float32(0))
        add_pairs(whole, words, scratch, scratch.view(np.int32), scale, factor)
        if whole is not part:
            part[:] = whole[:-1]


def _float32_above(value: float) -> np.float32:
    # A smaller std would be less noise than was accounted.
    near = np.float32(value)
    return near if float(near) >= value else np.nextafter(near, np.float32(np.inf))


def _add_in_double(flat: np.ndarray, std: float, key: CipherKey, divisor: float) -> None:
    """The same in float64: for tests and models in double precision, not for speed."""
    stream = key.stream()
    for start in range(0, flat.size, 2 * PAIRS):
        part = flat[start : start + 2 * PAIRS]
        half = (part.size + 1) // 2
        uniform = (stream.words(2 * half).view(np.uint64).astype(np.float64) + 0.5) * 2.0**-64
        radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: part.size]
        part[:] = (part + std * normal) / divisor
