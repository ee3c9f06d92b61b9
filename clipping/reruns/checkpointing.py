# SPDX-License-Identifier: Apache-2.0
"""What a run for the sake of its gradient does about tensors that are not kept: it keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.utils import checkpoint

_NAME = "_checkpoint_hook"


@contextmanager
def without_checkpoints() -> Iterator[list[bool]]:
    """Keep what non-reentrant checkpoints inside would compute again: that would draw, and call children, twice.

    Hands out a list that is empty as long as there is none.
    """
    met: list[bool] = []

    def kept(_: object) -> AbstractContextManager[None]:
        met.append(True)
        return nullcontext()

    known = getattr(checkpoint, _NAME, None)
    if known is None:
        yield met
        return
    setattr(checkpoint, _NAME, kept)
    try:
        yield met
    finally:
        setattr(checkpoint, _NAME, known)


@contextmanager
def unpacked() -> Iterator[None]:
    """Save tensors for a backward as they are: hooks (of a checkpoint around) are for the forward of the user."""
    autograd = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    found = []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        found.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(found):
            autograd._push_saved_tensors_default_hooks(pack, unpack)
