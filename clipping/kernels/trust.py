# SPDX-License-Identifier: Apache-2.0
"""Whether the kernels may run: they are compared with PyTorch once per device, and dropped where they differ.

Shapes: B examples, K groups, T positions, P outputs, D inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

SERVED = (torch.float32, torch.bfloat16, torch.float16)
FEWEST_POSITIONS = 16
"""Tensor cores multiply blocks of 16 terms or more; below it PyTorch wastes less."""

_MOST_PROGRAMS = 1 << 31
_SMALLEST_TILE = 64
# Odd sizes, and aligned ones with several tiles and prefetched runs: triton compiles these apart.
_SHAPES = ((3, 2, 70, 37, 45), (2, 1, 208, 208, 144))

Checks = tuple[tuple[str, Callable[[torch.device], str]], ...]
"""Kernels by name, with what compares each with its twin on a device: "" where they agree, else the difference."""

_verdicts: dict[tuple[torch.device, Checks], bool] = {}
_enabled = [False]


def available(device: torch.device | str) -> bool:
    """Whether `device` can run the kernels: CUDA of compute capability 8.0 or more, with triton installed."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def enable(wanted: bool = True) -> None:
    """Let the kernels take over on CUDA devices where they are available and trusted; off by default.

    Off, because no figure shows yet that they beat PyTorch's own products: `python -m benchmarks.kernels`
    measures it on a device.
    """
    _enabled[0] = wanted


def is_enabled() -> bool:
    """Whether the kernels may take over: `enable()` was called, and no `without()` block is open."""
    return _enabled[0]


@contextmanager
def without() -> Iterator[None]:
    """The PyTorch path only, for comparisons."""
    before, _enabled[0] = _enabled[0], False
    try:
        yield
    finally:
        _enabled[0] = before


def serves(left: Tensor, right: Tensor) -> bool:
    """Whether the kernels take a pair (B, K, T, P) and (B, K, T, D) on its device."""
    if left.device.type != "cuda" or left.device != right.device or not _enabled[0]:
        return False
    if left.dtype != right.dtype or left.dtype not in SERVED or not (left.numel() and right.numel()):
        return False
    num_examples, num_groups, num_positions, num_out = left.shape
    tiles = [-(-extent // _SMALLEST_TILE) for extent in (num_positions, num_out, right.shape[3])]
    programs = num_examples * num_groups * max(tiles[0] * tiles[0], tiles[1] * tiles[2])
    return num_positions >= FEWEST_POSITIONS and programs < _MOST_PROGRAMS and trusted(left.device)


def serves_total(left: Tensor, right: Tensor, into: Tensor | None) -> bool:
    """Whether the kernels add the weighted sum of a pair into `into`, or into a fresh total."""
    if into is not None and (into.dtype != torch.float32 or not into.is_contiguous()):
        return False
    return serves(left, right)


def trusted(device: torch.device | str, checks: Checks | None = None) -> bool:
    """Whether the kernels are available on `device` and pass their `checks` there (default: `OWN`); tried once per device.

    Guarantees
    ----------
    Where a kernel does not compile or differs, one UserWarning says so and False is returned from then on.
    Draws from no generator but its own.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    asked = device, OWN if checks is None else checks
    if asked not in _verdicts:
        _verdicts[asked] = available(device) and _agree(*asked)
    return _verdicts[asked]


def _agree(device: torch.device, checks: Checks) -> bool:
    for name, check in checks:
        try:
            found = check(device)
        except Exception as error:  # whatever a compiler or driver raises, training goes on without kernels
            found = f"{type(error).__name__}: {error}"
        if found:
            warnings.warn(
                f"expected the Triton kernels on {device} to agree with PyTorch; got, from the kernel of the {name}, "
                f"{found}; nothing to do, PyTorch's slower path is used from now on (other versions of triton may work)",
                UserWarning,
                stacklevel=2,
            )
            return False
    return True


def _problems(device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for dtype in SERVED:
        for num_examples, num_groups, num_positions, num_out, num_in in _SHAPES:
            left, right = (
                torch.randn(num_examples, num_groups, num_positions, width, generator=generator, device="cpu")
                for width in (num_out, num_in)
            )
            yield left.to(device, dtype), right.to(device, dtype)


def _check_norms(device: torch.device) -> str:
    from clipping.kernels import formed, ghost

    measures: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        lambda left, right: ghost.ghost_sq_norm(left, right)[0],
        formed.formed_sq_norm,
    )
    for left, right in _problems(device):
        exact = (left.double().mT @ right.double()).flatten(1).square().sum(1)
        for measure in measures:
            ratio = measure(left, right).double() / exact
            if not ((ratio >= 1) & (ratio < 1.01)).all():
                return (
                    f"squared norms off by factors of {ratio.tolist()} for {left.dtype} {tuple(left.shape)}"
                )
    return ""


def _check_sum(device: torch.device) -> str:
    from clipping.kernels import totals

    for left, right in _problems(device):
        weights = torch.linspace(0, 1, left.shape[0], device=device)
        exact = torch.einsum("b,bkpd->kpd", weights.double(), left.double().mT @ right.double())
        # The first example has weight 0, and must not enter whatever it holds.
        left[0] = torch.nan
        into = torch.ones(exact.shape, device=device)
        totals.weighted_sum(left, right, weights, into)
        error = (into.double() - 1 - exact).abs().max().item()
        if not error <= 1e-4 * (1 + exact.abs().max().item()):
            return f"a largest difference of {error} for {left.dtype} {tuple(left.shape)}"
    return ""


OWN: Checks = (("norms", _check_norms), ("weighted sum", _check_sum))
"""The checks of the kernels in this package."""
