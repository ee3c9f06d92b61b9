# SPDX-License-Identifier: Apache-2.0
"""The protocol of a collector: what the tape feeds during one backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from clipping.gradients.sample_grads import SampleGrads


class Collector(Protocol):
    """What the tape feeds during one backward.

    `unit` stands for the examples that are clipped together: no forward may deliver to two. None: nothing is added.
    """

    @property
    def unit(self) -> object | None:
        """The unit of this backward."""
        ...

    def ready(self, name: str, grads: SampleGrads, num_examples: int) -> None:
        """Take the whole per-example gradient of parameter `name`; called at most once for each name."""
        ...

    def complete(self, num_examples: int) -> None:
        """The backward has ended without an error."""
        ...


Idle = Callable[[str], bool]
"""Whether nothing in the running backward can still deliver to a parameter."""

Begin = Callable[[Idle], Collector]
"""Makes the collector of one backward."""


class Gathering:
    """Keeps everything as delivered and hands it over at the end."""

    def __init__(
        self, on_complete: Callable[[dict[str, SampleGrads], int], None], unit: object | None = None
    ) -> None:
        self._found: dict[str, SampleGrads] = {}
        self._on_complete = on_complete
        self.unit = unit

    def ready(self, name: str, grads: SampleGrads, num_examples: int) -> None:
        """Keep."""
        self._found[name] = grads

    def complete(self, num_examples: int) -> None:
        """Hand over."""
        self._on_complete(self._found, num_examples)
