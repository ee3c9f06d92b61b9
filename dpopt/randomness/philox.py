# SPDX-License-Identifier: Apache-2.0
"""Normal noise on CUDA in one pass over memory, where the Triton kernel serves and agrees with its numpy twin.

Importing this file imports no triton; the first noise that the kernel draws does (`dpopt.randomness.philox_kernel`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipping import kernels

# Each import of the kernel stands inside its function: triton may be missing, and loading it takes a while.


def serves(values: Tensor) -> bool:
    """Whether the kernel adds noise to `values` in place: enabled, on CUDA, contiguous, and in float32 or float64."""
    kind = values.dtype in (torch.float32, torch.float64) and values.is_contiguous()
    return values.device.type == "cuda" and kernels.is_enabled() and kind and trusted(values.device)


def trusted(device: torch.device | str) -> bool:
    """Whether the kernel of the noise is available on `device` and agreed with numpy there; tried once per device."""
    return kernels.trusted(device, (("noise", _check),))


def add_normal(values: Tensor, std: float, seed: int, stream: int, factor: float = 1.0) -> Tensor:
    """(values + std * normal) * factor, in place; see `dpopt.randomness.philox_kernel`."""
    from dpopt.randomness import philox_kernel

    return philox_kernel.add_normal(values, std, seed, stream, factor)


def _check(device: torch.device) -> str:
    from dpopt.randomness import philox_kernel

    seed, stream, count = 0xFEDCBA9876543210, 0x8000000000000001, 5000
    values = torch.ones(count, device=device)
    philox_kernel.add_normal(values, 2.0, seed, stream, factor=0.5)
    exact = (1 + 2.0 * philox_kernel.reference_normal(count, seed, stream)) * 0.5
    error = (values.cpu().double() - exact).abs().max().item()
    return "" if error <= 1e-5 else f"a largest difference of {error}"
