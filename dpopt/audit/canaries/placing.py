# SPDX-License-Identifier: Apache-2.0
"""Where Dirac canaries lie: a coordinate for each, of its own, in every group of parameters that is clipped by itself.

The law of this file: places are public, and no two canaries share one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpopt.audit.canaries.canary import Canaries


class There(NamedTuple):
    """The canaries in one parameter: their numbers and their places in it, flattened; both (E,), on its device."""

    numbers: Tensor
    places: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """For each group of parameters that holds canaries, by its number: the canaries in each of its parameters."""

    groups: Mapping[int, Mapping[str, There]]
    num_touched: int
    num_coordinates: int


def placed(
    canaries: Canaries,
    groups: Sequence[Sequence[str]],
    parameters: Mapping[str, Tensor],
    generator: torch.Generator,
) -> Places:
    """Choose the places: spread evenly over each group of at least m coordinates, or those that were named.

    Raises:
        ValueError: a named parameter is not trained, a place is outside, or no group is large enough.
    """
    found: dict[int, dict[str, There]] = {}
    for row, names in enumerate(groups):
        sizes = {name: parameters[name].numel() for name in names}
        if canaries.where is None:
            chosen = _spread(sizes, canaries.num, generator)
        else:
            chosen = _named(canaries, {n: s for n, s in sizes.items() if n in canaries.where})
        if chosen:
            found[row] = {n: There(*(x.to(parameters[n].device) for x in t)) for n, t in chosen.items()}
    _require(canaries, found, parameters)
    touched = sum(len(there.places) for group in found.values() for there in group.values())
    return Places(found, touched, sum(p.numel() for p in parameters.values()))


def _spread(sizes: Mapping[str, int], num: int, generator: torch.Generator) -> dict[str, There]:
    whole = sum(sizes.values())
    stride = whole // num
    if stride == 0:
        return {}
    places = torch.arange(num, device="cpu") * stride
    places += torch.randint(stride, (num,), generator=generator, device="cpu")
    owners = torch.randperm(num, generator=generator, device="cpu")
    chosen, start = {}, 0
    for name, size in sizes.items():
        here = (places >= start) & (places < start + size)
        if bool(here.any()):
            chosen[name] = There(owners[here], places[here] - start)
        start += size
    return chosen


def _named(canaries: Canaries, sizes: Mapping[str, int]) -> dict[str, There]:
    assert canaries.where is not None
    wanted = {name: sorted(set(canaries.where[name])) for name in sizes}
    for name, there in wanted.items():
        if there and not 0 <= there[0] <= there[-1] < sizes[name]:
            raise ValueError(
                f"expected places from 0 to {sizes[name] - 1} in {name!r}; got {there[0]} to {there[-1]}; count in the "
                "flattened parameter"
            )
    if sum(map(len, wanted.values())) < canaries.num:
        return {}
    chosen, start = {}, 0
    for name, there in wanted.items():
        here = there[: canaries.num - start]
        if here:
            numbers = torch.arange(start, start + len(here), device="cpu")
            chosen[name] = There(numbers, torch.tensor(here, device="cpu"))
        start += len(here)
    return chosen


def _require(canaries: Canaries, found: Mapping[int, object], parameters: Mapping[str, Tensor]) -> None:
    unknown = sorted(set(canaries.where or ()) - set(parameters))
    if unknown:
        raise ValueError(
            f"expected places in trained parameters; got {unknown[:4]}, which are frozen or not of the model; name some "
            f"of {sorted(parameters)[:6]}, or leave where out"
        )
    if not found:
        count = sum(parameter.numel() for parameter in parameters.values())
        raise ValueError(
            f"expected a coordinate for each of {canaries.num} canaries in a group of parameters that is clipped "
            f"together; got {count} trained coordinates in all, or too few in each group; take fewer canaries, or "
            "clip larger groups"
        )
