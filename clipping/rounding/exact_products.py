# SPDX-License-Identifier: Apache-2.0
"""Matrix products in full float32, whatever the user allows in the model.

TF32 and bfloat16 products, those of autocast among them, keep 8 to 11 bits. That is harmless in a forward, but a norm computed so may be too
small by far where the positions of an example cancel, and the clipped gradient then exceeds its bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache

import torch

EXACT = "ieee"
_AUTOCAST = ("cpu", "cuda")


@lru_cache(maxsize=1)
def _places() -> tuple[object, ...]:
    """Where torch keeps the precision of products and convolutions; empty before torch 2.9."""
    onednn = torch.backends.mkldnn
    found = [getattr(onednn, "matmul", None), getattr(onednn, "conv", None)]
    if torch.backends.cuda.is_built():
        found += [torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", None)]
    return tuple(place for place in found if hasattr(place, "fp32_precision"))


def _exact(value: str) -> bool:
    # "none" inherits: from highest on a fresh interpreter, but from TF32 where torch.backends.fp32_precision says so.
    inherited = getattr(torch.backends, "fp32_precision", "none")
    return value == EXACT or (value == "none" and inherited in ("none", EXACT))


def exact_products() -> AbstractContextManager[None]:
    """Full float32 in every product inside; the user's settings stand again afterwards."""
    places = _places()
    lowered = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or not places
    if lowered or not all([_exact(place.fp32_precision) for place in places]):  # pyright: ignore[reportAttributeAccessIssue]
        return _made_exact(places)
    return _AS_IT_IS


_AS_IT_IS = nullcontext()


@contextmanager
def _made_exact(places: tuple[object, ...]) -> Iterator[None]:
    with ExitStack() as after:
        for device_type in _AUTOCAST:
            if torch.is_autocast_enabled(device_type):  # a backward inside the block runs under it too
                after.enter_context(torch.autocast(device_type, enabled=False))
        if not places:
            after.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            after.enter_context(torch.backends.cudnn.flags(allow_tf32=False))
        for place in places:
            value: str = place.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
            if not _exact(value):
                after.callback(setattr, place, "fp32_precision", value)
                place.fp32_precision = EXACT  # pyright: ignore[reportAttributeAccessIssue]
        yield
