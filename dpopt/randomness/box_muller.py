# SPDX-License-Identifier: Apache-2.0
"""The transform of Box and Muller, compiled by numba: pairs of normals from pairs of random words.

Import it through `dpopt.randomness.normals`, which asks first whether numba is there.

Logarithm, sine and cosine are polynomials of single precision, without a branch, so that LLVM computes 8 or 16
at a time. Sources: Box and Muller (1958), Ann. Math. Statist. 29(2); polynomials as in Moshier's Cephes library
(logf, sinf, cosf), whose errors are below 2e-7 on the reduced ranges used here.
"""


# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import numpy as np
from numba import njit  # pyright: ignore[reportMissingImports]

f = np.float32
i32 = np.int32
u32 = np.uint32

_UNIT = f(2.0**-32)
_SQRT_HALF = f(0.70710678118654752)
_LN2_HIGH, _LN2_LOW = f(0.693359375), f(-2.12194440e-4)
_QUARTER_TURN = f(np.pi / 2 * 2.0**-30)


@njit(cache=True, nogil=True, error_model="numpy")
def add_pairs(total, words, radius, bits, std, factor):  # pyright: ignore[reportMissingParameterType]
    """total = (total + std * normals) * factor, in place.

    `total` float32 (2 N,) and `words` uint32 (2 N,), overwritten; `radius` float32 (N,) is scratch, and `bits` its
    memory as int32. Normals i and N + i come from words i and N + i.
    """
    half = radius.shape[0]
    for i in range(half):
        radius[i] = (f(words[i]) + f(0.5)) * _UNIT
    for i in range(half):  # uniform = mantissa in [1/2, 1) times a power of two
        raw = bits[i]
        bits[i] = (raw & i32(0x007FFFFF)) | i32(0x3F000000)
        words[i] = u32((raw >> i32(23)) - i32(126))
    for i in range(half):
        mantissa, exponent = radius[i], f(i32(words[i]))
        small = mantissa < _SQRT_HALF
        x = (mantissa + mantissa if small else mantissa) - f(1.0)
        exponent = exponent - (f(1.0) if small else f(0.0))
        z = x * x
        y = f(7.0376836292e-2) * x + f(-1.1514610310e-1)
        y = y * x + f(1.1676998740e-1)
        y = y * x + f(-1.2420140846e-1)
        y = y * x + f(1.4249322787e-1)
        y = y * x + f(-1.6668057665e-1)
        y = y * x + f(2.0000714765e-1)
        y = y * x + f(-2.4999993993e-1)
        y = (y * x + f(3.3333331174e-1)) * x * z
        y = y + _LN2_LOW * exponent - f(0.5) * z
        radius[i] = np.sqrt(f(-2.0) * (x + y + _LN2_HIGH * exponent)) * std
    for i in range(half):
        word = words[half + i]
        quarter = i32(word >> u32(30))
        t = (f(i32(word & u32(0x3FFFFFFF)) - i32(1 << 29)) + f(0.5)) * _QUARTER_TURN
        z = t * t
        sine = ((f(-1.9515295891e-4) * z + f(8.3321608736e-3)) * z + f(-1.6666654611e-1)) * z * t + t
        cosine = (f(2.443315711809948e-5) * z + f(-1.388731625493765e-3)) * z + f(4.166664568298827e-2)
        cosine = cosine * z * z - f(0.5) * z + f(1.0)
        odd = (quarter & i32(1)) == 1
        a, b = (sine if odd else cosine), (cosine if odd else sine)
        a = -a if (quarter == 1 or quarter == 2) else a
        b = -b if quarter >= 2 else b
        total[i] = (total[i] + radius[i] * a) * factor
        total[half + i] = (total[half + i] + radius[i] * b) * factor
