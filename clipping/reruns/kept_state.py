# SPDX-License-Identifier: Apache-2.0
"""What a model holds beside its parameters, wherever it keeps it: looked at, compared, and put back.

Seen: buffers and attributes of its modules; what is inside their lists, dicts, tuples and sets; objects of classes
that are written beside the modules' own; random generators among these. Not seen: globals, closures, other objects.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Set
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipping.reruns.module_state import ModuleState

DEEPEST = 8
"""Containers inside of each other that are opened at most."""

_UNSEEN = ("_parameters", "_modules", "_flat_weights")


class Value(NamedTuple):
    """Something that a model holds, and where."""

    path: str
    value: Any


def held(model: nn.Module) -> Iterator[Value]:
    """Every tensor, number, container and plain object that is reachable, each once."""
    kinds = {type(module).__module__ for module in model.modules()} - {"builtins"}
    kinds = {kind for kind in kinds if kind.partition(".")[0] not in ("torch", "dpopt", "clipping")}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if name not in _UNSEEN and not name.endswith("_hooks") and "_hooks_" not in name:
                shown = name if name != "_buffers" else ""
                yield from _below(".".join(filter(None, (prefix, shown))), value, kinds, seen, 0)


def _below(path: str, value: Any, kinds: Set[str], seen: set[int], depth: int) -> Iterator[Value]:
    if isinstance(value, nn.Module | nn.Parameter | type) or depth > DEEPEST:
        return
    if not isinstance(value, int | float | complex | str | bytes | type(None)):
        if id(value) in seen:
            return
        seen.add(id(value))
    yield Value(path, value)
    for name, inner in _inside(value, kinds):
        yield from _below(f"{path}.{name}" if path else str(name), inner, kinds, seen, depth + 1)


def _inside(value: Any, kinds: Set[str]) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list | tuple | deque):
        return list(enumerate(value))
    if isinstance(value, set | frozenset):
        return []
    if (
        not isinstance(getattr(value, "__dict__", None), dict)
        or callable(value)
        or isinstance(value, Tensor | ModuleType)
    ):
        return []
    if type(value).__module__ in kinds:
        return list(vars(value).items())
    # Of other objects, what a batch could be kept in: what is below is not theirs alone.
    return [(name, x) for name, x in vars(value).items() if isinstance(x, Tensor | int | float | _arrays())]


def _arrays() -> Any:
    numpy = sys.modules.get("numpy")
    return () if numpy is None else numpy.ndarray


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta" and value.layout is torch.strided


def same_tensors(first: Tensor, second: Tensor) -> bool:
    """Whether they hold the same bits, NaN included."""
    if first.dtype != second.dtype or first.shape != second.shape or first.device != second.device:
        return False
    a, b = (x.detach().reshape(-1).contiguous() for x in (first, second))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8)) if a.numel() else True


def _put(target: Tensor, value: Tensor) -> None:
    if not same_tensors(target, value):
        if target.shape == value.shape:
            target.data.copy_(value)
        else:
            target.data = value


def _put_array(target: Any, value: Any) -> None:
    if target.tobytes() != value.tobytes():  # a file may lie behind it
        target[...] = value


class Kept(NamedTuple):
    """What a model holds at one moment, and how to give it that again."""

    state: ModuleState
    repairs: tuple[Callable[[], None], ...]

    @staticmethod
    def of(model: nn.Module) -> Kept:
        """As it is now."""
        state = ModuleState.of(model.modules())
        return Kept(state, tuple(x for value in held(model) if (x := _repair(value.value)) is not None))

    def put_back(self) -> None:
        """Give every module, container and tensor what it held."""
        self.state.put_back()
        with torch.no_grad():
            for repair in self.repairs:
                repair()


def _repair(value: Any) -> Callable[[], None] | None:
    """What puts `value` back as it is now; None where nothing can change in it."""
    if isinstance(value, Tensor):
        known = value.detach().clone() if _is_tensor(value) and not value.requires_grad else None
        return None if known is None else lambda: _put(value, known)
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: value.set_state(state) and None
    if isinstance(value, random.Random):
        python = value.getstate()
        return lambda: value.setstate(python)
    if isinstance(value, _arrays()):
        copied = value.copy() if value.flags.writeable else None
        return None if copied is None else lambda: _put_array(value, copied)
    if hasattr(value, "bit_generator"):
        bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bits)
    return _refill(value)


def _refill(value: Any) -> Callable[[], None] | None:
    target = value if isinstance(value, dict | list | set | deque) else getattr(value, "__dict__", None)
    if target is None or isinstance(value, Tensor):
        return None
    contents = list(target.items()) if isinstance(target, dict) else list(target)

    def refill() -> None:
        now = list(target.items()) if isinstance(target, dict) else list(target)
        if len(now) == len(contents) and all(_is(a, b) for a, b in zip(now, contents, strict=True)):
            return
        # The plain methods: subclasses may forbid theirs, or do more.
        kind: Any = next(x for x in (dict, list, set, deque) if isinstance(target, x))
        kind.clear(target)
        put: Any = getattr(kind, "update" if kind in (dict, set) else "extend")
        put(target, contents)

    return refill


def _is(first: Any, second: Any) -> bool:
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second) == 2:
        return first[0] is second[0] and first[1] is second[1]
    return first is second


def contents(model: nn.Module) -> dict[str, Any]:
    """Copies of all tensors, arrays, numbers and texts that a model holds, by path."""
    found: dict[str, Any] = {}
    for path, value in held(model):
        if _is_tensor(value):
            found[path] = value.detach().clone()
        elif isinstance(value, _arrays()):
            found[path] = value.tobytes()
        elif isinstance(value, int | float | complex | str | bytes):
            found[path] = value
        elif isinstance(value, set | frozenset):
            found[path] = frozenset(x for x in value if isinstance(x, int | float | str))
    return found


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The paths at which two models hold different things."""
    return [
        path
        for path in dict.fromkeys((*first, *second))
        if path not in first or path not in second or not _equal(first[path], second[path])
    ]


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return same_tensors(first, second)
    return type(first) is type(second) and bool(first == second or (first != first and second != second))
