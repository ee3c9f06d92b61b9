# SPDX-License-Identifier: Apache-2.0
"""The state of the random generators that a module may draw from: read, compared, and put back.

Seen: torch's generator of the CPU and of the modules' devices, and generators that the modules hold. Python's own
and numpy's global one are looked at where `foreign` says so, as they take longer to read. Not seen: generators kept
anywhere else.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class RandomState(NamedTuple):
    """The states of all sources at one moment."""

    generators: tuple[Tensor, ...]
    foreign: tuple[Any, ...]

    def same(self, other: RandomState) -> bool:
        """Whether nothing was drawn in between."""
        pairs = zip(self.generators, other.generators, strict=True)
        return all(torch.equal(a, b) for a, b in pairs) and self.same_foreign(other)

    def same_foreign(self, other: RandomState) -> bool:
        """Whether Python's and numpy's generators are in the same state; True where they are not looked at."""
        return _plain(self.foreign) == _plain(other.foreign)


def _plain(foreign: tuple[Any, ...]) -> object:
    return [(x[1].tobytes(), *x[2:]) if isinstance(x[1], _arrays()) else x for x in foreign]


def _numpy() -> Any:
    return sys.modules.get("numpy")


def _arrays() -> Any:
    numpy = _numpy()
    return () if numpy is None else numpy.ndarray


def _default_generators(device: torch.device) -> tuple[torch.Generator, ...]:
    """Those of an accelerator; the CPU's is always looked at."""
    if device.type == "mps":
        return (torch.mps._get_default_mps_generator(),)
    found = getattr(getattr(torch, device.type, None), "default_generators", ())
    index = device.index or 0
    return tuple(found[index : index + 1])


class Sources(NamedTuple):
    """The generators to look at."""

    generators: tuple[torch.Generator, ...]
    foreign: bool

    @staticmethod
    def of(members: Iterable[nn.Module], *, foreign: bool) -> Sources:
        """Those that `members` may draw from."""
        found: dict[int, torch.Generator] = {id(torch.default_generator): torch.default_generator}
        for member in members:
            held = [x for x in vars(member).values() if isinstance(x, torch.Generator)]
            tensors = (*member._parameters.values(), *member._buffers.values())
            devices = {x.device for x in tensors if x is not None and x.device.type not in ("cpu", "meta")}
            for generator in (*held, *(g for device in devices for g in _default_generators(device))):
                found.setdefault(id(generator), generator)
        return Sources(tuple(found.values()), foreign)

    def read(self) -> RandomState:
        """The state of each."""
        states = tuple(generator.get_state() for generator in self.generators)
        if not self.foreign:
            return RandomState(states, ())
        numpy = _numpy()
        return RandomState(
            states, (random.getstate(), *([] if numpy is None else [numpy.random.get_state()]))
        )

    def write(self, state: RandomState) -> None:
        """Put every generator into `state`."""
        for generator, value in zip(self.generators, state.generators, strict=True):
            generator.set_state(value)
        if state.foreign:
            random.setstate(state.foreign[0])
        if len(state.foreign) > 1:
            _numpy().random.set_state(state.foreign[1])

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Whatever is drawn inside, the generators end as they were."""
        state = self.read()
        try:
            yield
        finally:
            self.write(state)
