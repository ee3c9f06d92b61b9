# SPDX-License-Identifier: Apache-2.0
"""Input canaries: items that go through the data loader and the model as records do, and what makes them.

The law of this file: no canary is made of a private record, which would then be in the data twice, at half the
protection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dpopt.audit.canaries.canary import Canaries
from dpopt.sampling import Records

_AT_ONCE = 256


class Extended:
    """A data set and `more` items behind it; only those of them that are drawn are ever asked for."""

    def __init__(self, records: Records[object], more: Sequence[object]) -> None:
        self._records = records
        self._more = more

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> object:
        behind = index - len(self._records)
        return self._records[index] if behind < 0 else self._more[behind]


def losses_of(canaries: Canaries) -> Tensor:
    """(m,) losses of all canaries at the model as it is.

    Raises:
        ValueError: the function of losses gives another number of them.
    """
    assert canaries.records is not None and canaries.losses is not None
    found = []
    with torch.no_grad():
        for start in range(0, canaries.num, _AT_ONCE):
            part = list(canaries.records[start : start + _AT_ONCE])
            losses = canaries.losses(part)
            if losses.shape != (len(part),):
                raise ValueError(
                    f"expected one loss for each of {len(part)} canaries; got the shape {tuple(losses.shape)}; return "
                    "losses of shape (B,)"
                )
            found.append(losses.detach())
    return torch.cat(found)


def mislabelled(
    examples: Sequence[tuple[Any, Any]], num_classes: int, generator: torch.Generator | None = None
) -> list[tuple[Any, Any]]:
    """Public or made-up examples (input, label) with another label each, drawn evenly out of the wrong ones.

    Args:
        examples: never private records: see `Canaries`.
        num_classes: labels are 0 .. num_classes - 1.
        generator: what draws the labels; None: torch's own.

    Returns:
        As many examples, labels of the type that they had.

    Raises:
        ValueError: there are fewer than two classes.

    Example:
        >>> mislabelled([("a", 0), ("b", 1)], num_classes=2)
        [('a', 1), ('b', 0)]
    """
    if num_classes < 2:
        raise ValueError(f"expected at least 2 classes to mislabel; got {num_classes}; count the labels")
    moves = torch.randint(1, num_classes, (len(examples),), generator=generator, device="cpu").tolist()
    found = []
    for (given, label), move in zip(examples, moves, strict=True):
        wrong = (int(label) + move) % num_classes
        told = torch.full_like(cast("Tensor", label), wrong) if isinstance(label, Tensor) else wrong
        found.append((given, told))
    return found


def random_tokens(
    num: int, length: int, vocabulary: Sequence[int], generator: torch.Generator
) -> list[Tensor]:
    """`num` sequences of `length` token ids, each drawn evenly and independently out of `vocabulary`."""
    known = torch.tensor(list(vocabulary), device="cpu")
    return list(known[torch.randint(len(known), (num, length), generator=generator, device="cpu")])
