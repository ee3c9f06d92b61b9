# SPDX-License-Identifier: Apache-2.0
"""The attributes of modules at one moment, so that a forward can be run again as it ran, and leave nothing behind."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque, OrderedDict)
_DERIVED = ("_flat_weights",)  # a recurrent layer's list of what is in `_parameters`


def _contents(value: Any) -> Any:
    return value.copy() if type(value) in _CONTAINERS else None


def _fill(value: Any, contents: Any) -> None:
    value.clear()
    if isinstance(value, list | deque):
        value.extend(contents)
    else:
        value.update(contents)


def _same(first: Any, second: Any) -> bool:
    """Whether two containers hold the same objects, in the same order."""
    if len(first) != len(second):
        return False
    if isinstance(first, set):
        return first == second
    pairs = zip(first, second, strict=True)
    if not all(a is b or (isinstance(a, str) and a == b) for a, b in pairs):
        return False
    return not isinstance(first, dict) or all(
        a is b for a, b in zip(first.values(), second.values(), strict=True)
    )


class _Member(NamedTuple):
    """The attributes of one module, and what those that are containers held."""

    module: nn.Module
    attributes: dict[str, Any]
    contents: dict[str, Any]

    @staticmethod
    def of(module: nn.Module) -> _Member:
        attributes = dict(vars(module))
        found = {name: _contents(value) for name, value in attributes.items()}
        return _Member(module, attributes, {name: x for name, x in found.items() if x is not None})

    def changed(self) -> bool:
        """Whether anything was set, taken away, or put into a container since."""
        now = vars(self.module)
        if now.keys() != self.attributes.keys():
            return True
        if not all(now[name] is value for name, value in self.attributes.items() if name not in _DERIVED):
            return True
        return not all(_same(now[name], x) for name, x in self.contents.items() if name not in _DERIVED)

    def put_back(self) -> None:
        now = vars(self.module)
        now.clear()
        now.update(self.attributes)
        for name, contents in self.contents.items():
            if not _same(now[name], contents):
                _fill(now[name], contents)


class ModuleState(NamedTuple):
    """The attributes of some modules; tensors changed in place are told by `Copied`."""

    members: tuple[_Member, ...]

    @staticmethod
    def of(modules: Iterable[nn.Module]) -> ModuleState:
        """As they are now."""
        return ModuleState(tuple(_Member.of(module) for module in modules))

    def changed(self) -> bool:
        """Whether a module has other attributes now."""
        return any(member.changed() for member in self.members)

    def put_back(self) -> None:
        """Give every module its attributes again; the containers it held hold again what they held."""
        for member in self.members:
            member.put_back()


class Held(NamedTuple):
    """Where a module keeps a tensor that is no parameter: a buffer, or a plain attribute."""

    module: nn.Module
    name: str
    buffer: bool

    @property
    def tensor(self) -> Tensor | None:
        """What is there now."""
        place = self.module._buffers if self.buffer else vars(self.module)
        found = place.get(self.name)
        return found if isinstance(found, Tensor) else None

    def put(self, tensor: Tensor) -> None:
        """Put another tensor there."""
        (self.module._buffers if self.buffer else vars(self.module))[self.name] = tensor


def held_tensors(modules: Iterable[nn.Module]) -> list[Held]:
    """Every buffer and tensor attribute outside of a graph."""
    found: list[Held] = []
    for module in modules:
        found += [Held(module, name, True) for name, x in module._buffers.items() if x is not None]
        plain = (name for name, x in vars(module).items() if isinstance(x, Tensor) and not x.requires_grad)
        found += [Held(module, name, False) for name in plain]
    return found


def copied(places: Iterable[Held]) -> list[tuple[Held, Tensor]]:
    """A copy of each tensor, with the place it belongs to; what is gone is left out."""
    found = [(place, place.tensor) for place in places]
    return [(place, tensor.clone()) for place, tensor in found if tensor is not None]
