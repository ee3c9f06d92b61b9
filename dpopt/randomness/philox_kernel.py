# SPDX-License-Identifier: Apache-2.0
"""Normal noise added in one pass over memory, from a counter-based generator.

Shapes: N elements, in windows of 2 * HALF; element i of a window and element i + HALF share one counter.

The stream: Philox4x32-10, key = seed (64 bits), counter = (number of the pair, 64 bits; stream, 64 bits). Its
128 bits give one pair of normals by Box and Muller. A pair of (seed, stream) names one sequence: under one key,
different streams never use the same counter, so they are disjoint pieces of one permutation of 2^128 blocks;
under different keys they are different permutations. The same (seed, stream) gives the same noise, for any N.

A release would call it, per parameter, as `add_normal(total, std, seed=fresh 64-bit secret, stream=0)`, where
`dpopt.randomness.keys` derives the secret from (run key, step, name), or one secret per step and the parameter's
number as the stream. Like torch's CUDA generator it is keyed by 64 bits and is no cipher.

References: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3", SC11 (Philox, and the known
answers in the tests); Box and Muller (1958), Ann. Math. Statist. 29(2).
"""

import math

import numpy as np
import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from clipping.kernels.blocks import current

HALF = 512
"""Half a window: part of the definition of the stream, not a tuning knob."""

LARGEST = math.sqrt(130 * math.log(2))
"""The largest |normal|, 9.49: the smallest uniform is 2^-65. A true normal exceeds it with probability 2e-21."""

_MASK = (1 << 32) - 1


@triton.jit
def _uniform(high, low):
    """(0, 1] from 64 bits, in float64."""
    bits = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    return (bits.to(tl.float64) + 0.5) * 5.421010862427522e-20


@triton.jit(do_not_specialize=["seed", "stream", "count"])
def normal_kernel(
    values, count, std, factor,
    seed: tl.int64, stream: tl.int64,  # pyright: ignore[reportInvalidTypeForm]
    HALF: tl.constexpr,
):  # fmt: skip
    """Element i of `values` becomes (element + std * normal(seed, stream, i)) * factor."""
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, HALF).to(tl.int64)
    pair = program * HALF + lanes
    stream = pair * 0 + stream
    a, b, c, d = tl.philox(
        seed, pair.to(tl.uint32), (pair >> 32).to(tl.uint32), stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    )  # fmt: skip
    radius = tl.sqrt(-2.0 * tl.log(_uniform(a, b)))
    angle = 6.283185307179586 * _uniform(c, d)
    first = program * (2 * HALF) + lanes
    second = first + HALF
    x = tl.load(values + first, mask=first < count, other=0.0).to(tl.float64)
    y = tl.load(values + second, mask=second < count, other=0.0).to(tl.float64)
    tl.store(values + first, (x + radius * tl.cos(angle) * std) * factor, mask=first < count)
    tl.store(values + second, (y + radius * tl.sin(angle) * std) * factor, mask=second < count)


def add_normal(values: Tensor, std: float, seed: int, stream: int, factor: float = 1.0) -> Tensor:
    """Replace the contiguous `values` by (values + std * normal) * factor, in place.

    Guarantees
    ----------
    Each element has a normal of its own, independent of the others and of every other (seed, stream). Uniforms
    have 64 bits and the arithmetic is float64, rounded once at the end: normals reach |z| = 9.49 (LARGEST),
    where triton's own randn stops at 5.7 and float32 uniforms of 32 bits at 6.8. `std` is rounded up to float32.
    """
    if values.dtype not in (torch.float32, torch.float64) or not values.is_contiguous():
        raise ValueError(
            f"expected contiguous float32 or float64 values; got {values.dtype} with strides {values.stride()}; "
            "pass values.contiguous(), in the precision in which it was summed"
        )
    if not (math.isfinite(std) and std >= 0 and 0 <= min(seed, stream) and max(seed, stream) < 1 << 64):
        raise ValueError(
            f"expected a finite std >= 0 and a seed and a stream of 64 bits; got std={std} and others not shown; "
            "draw the seed with secrets.randbits(64)"
        )
    programs = triton.cdiv(values.numel(), 2 * HALF)
    if programs:
        with current(values.device):
            normal_kernel[(programs,)](
                values, values.numel(), _float32_above(std), factor, _signed(seed), _signed(stream), HALF=HALF,
                num_warps=4, enable_fp_fusion=True,  # pyright: ignore[reportCallIssue]
            )  # fmt: skip
    return values


def _float32_above(value: float) -> float:
    # Scalars reach a kernel as float32, and a smaller std would be less noise than was accounted.
    near = np.float32(value)
    return float(near if float(near) >= value else np.nextafter(near, np.float32(np.inf)))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def philox(counter: tuple[np.ndarray, ...], seed: int) -> tuple[np.ndarray, ...]:
    """Four words (uint64 arrays below 2^32) from four: Philox4x32-10 in numpy, the reference of the kernel."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        even, odd = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        shift, mask = np.uint64(32), np.uint64(_MASK)
        c0, c1 = (odd >> shift) ^ c1 ^ np.uint64(k0), odd & mask
        c2, c3 = (even >> shift) ^ c3 ^ np.uint64(k1), even & mask
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def reference_normal(count: int, seed: int, stream: int) -> Tensor:
    """(count,) float64 on CPU: what the kernel draws, computed without it."""
    pair = np.arange(-(-count // (2 * HALF)) * HALF, dtype=np.uint64)
    zero, shift = np.zeros_like(pair), np.uint64(32)
    low, high = zero + np.uint64(stream & _MASK), zero + np.uint64(stream >> 32)
    a, b, c, d = philox((pair & np.uint64(_MASK), pair >> shift, low, high), seed)
    first, second = (((x << shift | y).astype(np.float64) + 0.5) * 2.0**-64 for x, y in ((a, b), (c, d)))
    radius, angle = np.sqrt(-2.0 * np.log(first)), 2 * np.pi * second
    halves = (radius * np.cos(angle)).reshape(-1, HALF), (radius * np.sin(angle)).reshape(-1, HALF)
    return torch.from_numpy(np.concatenate(halves, axis=1).reshape(-1)[:count])
