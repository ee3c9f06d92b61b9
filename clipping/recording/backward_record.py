# SPDX-License-Identifier: Apache-2.0
"""What one backward has recorded so far, and which parameters nothing can reach any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from weakref import WeakSet

from clipping.collectors.collector import Begin
from clipping.gradients.sample_grads import SampleGrads
from clipping.gradients.sum import add
from clipping.recording.tap import Point
from clipping.rounding.exact_products import exact_products


def exhausted(delivered: set[Point], calls: WeakSet[Point]) -> bool:
    """Whether each of the calls that are still alive has delivered."""
    return all(call in delivered for call in calls)


def idle(
    found: Mapping[str, SampleGrads], delivered: set[Point], calls: Mapping[str, WeakSet[Point]], name: str
) -> bool:
    """Whether nothing of `name` is still to be handed over before the end of the backward."""
    return name not in found and exhausted(delivered, calls[name])


class Record:
    """What one backward has delivered so far; it lives as long as that backward.

    `calls` are, for each parameter, the calls still alive: each delivers at most once in a backward, so that a
    parameter is whole when all of them have.
    """

    def __init__(
        self, begin: Begin, calls: Mapping[str, WeakSet[Point]], lock: AbstractContextManager[object]
    ) -> None:
        self.num_examples: int | None = None
        self._lock = lock
        self._calls = calls
        # The calls themselves: the id of one that is gone may be that of another.
        self._delivered: set[Point] = set()
        self._found: dict[str, SampleGrads] = {}
        self._checks: list[Callable[[], None]] = []
        # Not a bound method: a cycle would keep a failed backward's tensors until the collector of cycles runs.
        self._collector = begin(partial(idle, self._found, self._delivered, calls))
        self.unit = self._collector.unit
        """What the examples of this backward are clipped with; None where nothing of it is added."""

    def _exhausted(self, name: str) -> bool:
        return exhausted(self._delivered, self._calls[name])

    def take(self, point: Point, names: Iterable[str], grads: Mapping[str, SampleGrads]) -> None:
        """Keep what `point` delivered of `names`, by parameter name; hand over the parameters that are whole.

        To be called inside `exact_products`.
        """
        self._delivered.add(point)
        for name, found in grads.items():
            known = self._found.get(name)
            self._found[name] = found if known is None else add(known, found)
        whole = [name for name in dict.fromkeys(names) if name in self._found and self._exhausted(name)]
        if whole:
            self._hand_over(whole)

    def check(self, check: Callable[[], None], *, now: bool) -> None:
        """Run `check`, at the end of the backward unless `now`: it waits for the device."""
        if now:
            check()
        else:
            self._checks.append(check)

    def complete(self) -> None:
        """Hand over the rest."""
        for check in self._checks:
            check()
        with self._lock, exact_products():
            self._hand_over(list(self._found))
            self._collector.complete(self.num_examples or 0)

    def _hand_over(self, names: list[str]) -> None:
        for name in names:
            self._collector.ready(name, self._found.pop(name), self.num_examples or 0)
