# SPDX-License-Identifier: Apache-2.0
"""Several backwards of the same examples, merged into one: row i of each is of example i. And backwards kept.

Shapes: B examples.
"""

from __future__ import annotations

from torch import Tensor

from clipping.collectors.collector import Collector
from clipping.gradients.sample_grads import SampleGrads
from clipping.gradients.sum import add
from clipping.rounding.exact_products import exact_products


class Merging:
    """What several backwards of the same examples deliver, added up until all of them have."""

    def __init__(self) -> None:
        self.num_examples: int | None = None
        self.unit: object = object()
        self._found: dict[str, SampleGrads] = {}

    def take(self, found: dict[str, SampleGrads], num_examples: int) -> None:
        """Add what one backward delivered."""
        if self.num_examples is not None and num_examples != self.num_examples:
            raise ValueError(
                "expected every backward in a same_examples() block on the same examples; got another number of rows; "
                "open a block for each part of the batch"
            )
        self.num_examples = num_examples
        for name, grads in found.items():
            known = self._found.get(name)
            self._found[name] = grads if known is None else add(known, grads)

    def idle(self, name: str) -> bool:
        """Whether nothing of `name` is left to be handed over."""
        return name not in self._found

    def hand_over(self, collector: Collector) -> None:
        """Give everything to `collector`."""
        num_examples = self.num_examples or 0
        with exact_products():  # outside a backward, a block of autocast of the user's may be open
            while self._found:
                name, grads = self._found.popitem()
                collector.ready(name, grads, num_examples)
            collector.complete(num_examples)


class Held:
    """What one backward delivered, kept so that it can be summed more than once; `keep` as in `Sums`."""

    def __init__(self, found: dict[str, SampleGrads], num_examples: int, keep: Tensor | None = None) -> None:
        self._found = found
        self._num_examples = num_examples
        self.keep = keep
        self._left: set[str] = set()

    def idle(self, name: str) -> bool:
        """Whether nothing of `name` is left to be handed over in this round."""
        return name not in self._left

    def hand_over(self, collector: Collector) -> None:
        """Give everything to `collector`, and keep it."""
        self._left = set(self._found)
        with exact_products():
            for name, grads in self._found.items():
                self._left.discard(name)
                collector.ready(name, grads, self._num_examples)
            collector.complete(self._num_examples)
