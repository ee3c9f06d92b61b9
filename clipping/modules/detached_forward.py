# SPDX-License-Identifier: Apache-2.0
"""The forward calls that have begun: while one runs, its layer holds detached parameters.

The law of this file: every parameter is put back, whether the call returns, raises or is interrupted.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from clipping.errors import UnrecordedParameter
from clipping.modules.children_with_rules import OwnRun
from clipping.modules.layers import Layer
from clipping.reruns.reruns import Place, place_parameters


class _Held(NamedTuple):
    """The parameters of one module, and the list of them that torch's recurrent layers run on instead."""

    module: nn.Module
    parameters: dict[str, nn.Parameter | None]
    flat: list[nn.Parameter] | None

    @staticmethod
    def of(module: nn.Module) -> _Held:
        """What `module` holds now."""
        return _Held(module, dict(module._parameters), vars(module).get("_flat_weights"))

    def detach(self) -> None:
        """Give the module detached parameters."""
        for name, parameter in self.parameters.items():
            if parameter is not None:
                self.module._parameters[name] = parameter.detach()  # pyright: ignore[reportArgumentType]
        if self.flat is not None:
            vars(self.module)["_flat_weights"] = [x.detach() for x in self.flat]

    def put_back(self) -> None:
        """Give the module its parameters again."""
        self.module._parameters.update(self.parameters)
        if self.flat is not None:
            vars(self.module)["_flat_weights"] = self.flat


class Opening(NamedTuple):
    """A call of which only the module's own code is recorded, on stand-ins for the parameters that it uses.

    `opened` are the modules whose code counts as its own.
    """

    places: tuple[Place, ...]
    stand_ins: Mapping[str, Tensor]
    opened: frozenset[int]
    run: OwnRun

    @property
    def members(self) -> list[nn.Module]:
        """The modules that hold such parameters."""
        return list({id(place.module): place.module for place in self.places}.values())


class Ended(NamedTuple):
    """A recorded call that has ended, and what was kept of it where it began."""

    layer: Layer
    begun: object


class _Frame(NamedTuple):
    """One call and the parameters to put back; `held` is None where the call is not recorded."""

    layer: Layer
    thread: int
    held: list[_Held] | None
    opening: Opening | None = None
    begun: object = None

    def is_ours(self) -> bool:
        """Whether the call began in this thread."""
        return self.thread == threading.get_ident()

    def explains(self, module: nn.Module) -> bool:
        """Whether the record of this call covers `module`: a module handed in as an argument is not below it."""
        if self.held is None:
            return False
        if self.opening is not None:
            return id(module) in self.opening.opened
        return self.layer.whole and any(x is module for x in self.layer.members)

    def put_back(self) -> None:
        """Give every module its parameters again."""
        for held in self.held or ():
            held.put_back()


def _refuse_replaced(
    layer: Layer, known: Mapping[str, nn.Parameter], stand_ins: Mapping[str, list[Tensor]]
) -> None:
    for local, name in layer.names.items():
        path, _, last = local.rpartition(".")
        found = layer.module.get_submodule(path)._parameters.get(last)
        if found is not known[name] and all(found is not x for x in stand_ins.get(name, ())):
            raise UnrecordedParameter(
                f"expected layer {layer.name or 'model'!r} to run with its own parameter {name!r}; got another tensor in "
                "its place (torch.func.functional_call), whose gradient would be taken for the parameter's; call "
                "the model itself"
            )


class Frames:
    """A stack of calls: layers nest only where a module without a rule holds others, or calls itself."""

    def __init__(self) -> None:
        self._stack: list[_Frame] = []

    def __len__(self) -> int:
        """How many calls have begun and not ended."""
        return len(self._stack)

    @property
    def own_run(self) -> OwnRun | None:
        """The innermost forward whose children keep rules of their own."""
        return next((x.opening.run for x in reversed(self._stack) if x.opening is not None), None)

    def explained(self, module: nn.Module) -> bool:
        """Whether the record of a running call covers `module`."""
        return any(frame.explains(module) for frame in self._stack)

    def require_one_thread(self) -> None:
        """Raise RuntimeError where another thread is in a call."""
        if self._stack and not self._stack[-1].is_ours():
            raise RuntimeError(
                "expected one forward call at a time on a recorded model; got calls from two threads; run them one "
                "after the other, or give each thread a copy of the model"
            )

    @contextmanager
    def occupied(self, layer: Layer) -> Iterator[None]:
        """A call of `layer` is about to begin in this thread."""
        self._stack.append(_Frame(layer, threading.get_ident(), None))
        try:
            yield
        finally:
            self._stack.pop()

    def begin(
        self,
        layer: Layer,
        recording: bool,
        known: Mapping[str, nn.Parameter],
        opening: Opening | None = None,
        begun: object = None,
    ) -> bool:
        """Detach the layer's parameters, unless a module around it explains them or nothing is recorded.

        With an `opening`, only those of its own code are taken away, and stand-ins put in their place. `begun` is handed
        back at the end. Returns whether the call is recorded. Raises RuntimeError where another thread is in a call,
        and UnrecordedParameter where the layer holds something else than the parameters `known` by canonical name.
        """
        self.require_one_thread()
        if not recording or self.explained(layer.module):
            self._stack.append(_Frame(layer, threading.get_ident(), None))
            return False
        _refuse_replaced(layer, known, self._stand_ins())
        held = [_Held.of(member) for member in (layer.members if opening is None else opening.members)]
        self._stack.append(_Frame(layer, threading.get_ident(), held, opening, begun))
        if opening is not None:
            place_parameters(opening.places, opening.stand_ins)
            return True
        for member in held:
            member.detach()
        return True

    def _stand_ins(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for frame in self._stack:
            for name, value in ({} if frame.opening is None else frame.opening.stand_ins).items():
                found.setdefault(name, []).append(value)
        return found

    def end(self, module: nn.Module) -> Ended | None:
        """Put the parameters of `module` back; its layer where the call was recorded, else None."""
        if not self._stack or self._stack[-1].layer.module is not module or not self._stack[-1].is_ours():
            return None
        frame = self._stack.pop()
        frame.put_back()
        return None if frame.held is None else Ended(frame.layer, frame.begun)

    def unwind(self) -> None:
        """Put back what an interrupt (KeyboardInterrupt skips forward hooks) left detached in this thread."""
        while self._stack and self._stack[-1].is_ours():
            self._stack.pop().put_back()
