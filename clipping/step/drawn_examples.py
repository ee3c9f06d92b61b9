# SPDX-License-Identifier: Apache-2.0
"""Which examples of a drawn batch have come: the count that keeps a step within its sensitivity.

The law of this file: a step holds each drawn example at most once, and all of them or none when it is released.
Messages never name the size of a drawn batch: it is secret.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Admission:
    """The examples of one step.

    `num_drawn` is the size of the batch that the sampler drew, None outside a step; `num_added` of them have come.
    `drawn` are its records where they are known. `unfinished` backwards have added a part of their examples.
    """

    num_drawn: int | None = None
    num_added: int = 0
    drawn: frozenset[int] | None = None
    unfinished: int = 0
    _kept: int | None = None
    _expected: int | None = None
    _met: bool = False
    _used: set[int] = field(default_factory=set)

    def begin(self, num_drawn: int, records: Iterable[int] | None) -> None:
        """Start on a batch."""
        if self.num_added > 0:
            raise RuntimeError(
                "expected the last batch to be released before the next one; got one whose gradients are pending; "
                "release each batch by itself (two independent draws in one step are not one Poisson draw), or "
                "call discard() to give it up, as after an interrupted cell"
            )
        self.num_drawn = num_drawn
        self.drawn = None if records is None else frozenset(records)

    def discard(self) -> None:
        """None of the batch has come."""
        self.num_added = self.unfinished = 0
        self._used.clear()

    def end(self) -> None:
        """Outside a step."""
        self.discard()
        self.num_drawn = self.drawn = None

    def expect(self, num_rows: int, kept: int | None) -> None:
        """A backward of so many losses begins, of which `kept` are examples (None: all)."""
        self._expected, self._kept, self._met = num_rows, kept, False

    def forget_expected(self) -> None:
        """That backward has ended, or failed."""
        self._expected = self._kept = None

    def require_met(self) -> None:
        """Raise RuntimeError where the last backward met no layer of the model."""
        if not self._met:
            raise RuntimeError(
                "expected losses of the model that was made private; got a backward that never met its layers; "
                "compute them with that model (not with a copy of it), gradients enabled"
            )

    def meet(self, num_examples: int) -> None:
        """A backward has met the model: refuse another number of examples than of losses."""
        self._met = True
        if self._expected is not None and num_examples != self._expected:
            raise ValueError(
                f"expected losses for the examples that the model saw; got {self._expected} losses and "
                f"{num_examples} examples; compute one loss for each row of the batch"
            )

    def admit(self, num_examples: int | None) -> None:
        """Count a backward's examples before their first addition to the totals; None once all are added."""
        if num_examples is None:
            self.unfinished -= 1
            return
        self.meet(num_examples)
        self.require_drawn()
        counted = num_examples if self._kept is None else self._kept
        if self.num_added + counted > (self.num_drawn or 0):
            raise RuntimeError(
                "expected each drawn example once per step; got more rows than were drawn, which would break the "
                "sensitivity; send several losses of the same examples back as one sum, or inside same_examples(); an attack "
                "on the inputs, or a generator's loss, inside paused(); public examples in a step of their own, inside "
                "public_examples(); after a failed or repeated backward call discard() and run the whole batch again; "
                "where users are drawn, join the records of each into one example, and where several rows are made of one "
                "(crops, frames, choices), send back one loss for each example"
            )
        self.num_added += counted
        self.unfinished += 1

    def name(self, records: Sequence[int] | None, num_rows: int) -> Sequence[int]:
        """The records of the rows of a backward, each drawn and named once."""
        if records is None or len(records) != num_rows or self._kept is not None:
            raise ValueError(
                "expected to be told which record each row of the losses is, as this estimator remembers each one, and "
                "no padding; got rows without records; pass records=part.indices, with part from batch.parts(size)"
            )
        named = set(records)
        known = self.drawn is None or named <= self.drawn
        if len(named) != num_rows or not known or self._used & named:
            raise ValueError(
                "expected each record of the drawn batch once in a step; got one that was not drawn, or one twice; pass "
                "the indices of the batch in the order of its rows"
            )
        self._used |= named
        return records

    def require_drawn(self) -> None:
        """Raise RuntimeError outside a step."""
        if self.num_drawn is None:
            raise RuntimeError(
                "expected a backward on a batch that the private sampler drew; got one outside a step; take the "
                "examples from batches(...) or from the private data loader itself (not from a copy that another library "
                "made of it), each batch once, train on public examples inside public_examples(), send gradients to inputs or to a "
                "generator inside paused(), and use torch.no_grad() to look"
            )

    def require_ended(self) -> None:
        """Raise RuntimeError where the drawn batch was not released."""
        if self.num_drawn is not None:
            raise RuntimeError(
                "expected release() on every drawn batch, an empty one included; got the next request before "
                "it; skipping a step because of what was drawn would itself tell about the data"
            )

    def require_none_pending(self) -> None:
        """Raise RuntimeError where examples have come and were not released."""
        if self.num_added > 0:
            raise RuntimeError(
                "expected no private gradients to be pending where public examples begin; got some, which would be taken "
                "at other weights than the rest of their batch; take the private step first, or call discard()"
            )

    def require_whole(self) -> None:
        """Raise RuntimeError where a failed backward left a part of its examples in the sums."""
        if self.unfinished:
            raise RuntimeError(
                "expected a step without a failed backward; got one that had added a part of its examples' gradients "
                "when it failed; call discard() and run the whole batch again"
            )

    def require_counted(self) -> None:
        """Raise RuntimeError where some of the drawn examples came and others did not."""
        if 0 < self.num_added < (self.num_drawn or 0):
            raise RuntimeError(
                "expected every drawn example in the losses, or none; got fewer rows than were drawn: two parts of the "
                "batch added into one loss look like one, and would be clipped as one; accumulate each part, and "
                "give an example that says nothing a loss of 0"
            )
