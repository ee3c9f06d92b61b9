# SPDX-License-Identifier: Apache-2.0
"""The sensitive side of one step: clipped sums collected over any number of micro-batches.

The law of this file: what a failed backward left behind never enters the sum. Which examples have come:
`clipping.step.drawn_examples`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clipping.clippers.clipper import Clipper
from clipping.collectors.collector import Collector, Gathering, Idle
from clipping.collectors.one_pass import Clipping, Sums
from clipping.collectors.same_examples import Held, Merging
from clipping.collectors.two_pass import Measuring, Summing
from clipping.contributions.clipped_sum import ClippedSum, Group, zero_sum
from clipping.contributions.contribution import Contribution
from clipping.gradients.path_costs import Costs
from clipping.gradients.sample_grads import SampleGrads
from clipping.loss_checks import LossChecks
from clipping.recording.altered_gradients import reaches, refuse_altered
from clipping.recording.tape import Tape
from clipping.step.drawn_examples import Admission
from clipping.validators.runtime_probe import Probing
from clipping.validators.runtime_rehearsal import Rehearsing


class StepSum:
    """Collects the clipped gradients of one step from a tape.

    `mean` says that each backward starts from the mean of its examples' losses (else from their sum).
    `two_pass` runs two backwards for each loss: norms, then sums, so that no output gradient is held.
    `contribution` is what each example adds, until `begin` gives another stage. `hold` says that more parts of the
    drawn batch are to come; `num_part` is the size of the part handed out last. `blank` says that nobody was drawn, and
    that the rows handed out stand in: they go through every check that examples go through, so that nothing is
    accepted or refused by the luck of a draw, and are dropped where examples would be clipped.
    """

    def __init__(
        self,
        model: nn.Module,
        contribution: Contribution,
        *,
        mean: bool,
        batch_dim: int = 0,
        two_pass: bool = False,
        costs: Costs,
    ) -> None:
        self.tape = Tape(model, self._begin, batch_dim=batch_dim, mean=mean)
        contribution.require_apart(list(self.tape.parameters))
        groups = contribution.clipper.groups(list(self.tape.parameters))
        self.sums = Sums(contribution, groups, mean, costs, self.tape.parameters)
        self.two_pass = two_pass
        self.admission = Admission()
        self.hold = False
        self.num_part = 0
        self.blank = False
        self.probing = Probing(self.tape, self._part, lambda: self.rehearsing.holds())
        self.rehearsing = Rehearsing(self.tape, self._part, self.probing.renew)
        self.checks: LossChecks | None = None
        self._roots: list[Sequence[Any]] = []
        self._measuring: Measuring | None = None
        self._merging: Merging | None = None
        self._running = self.sums
        self._held: list[Held] | None = None
        self._pairs = False
        self._groups: tuple[Contribution, tuple[Group, ...]] | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return self.tape.parameters

    @property
    def contribution(self) -> Contribution:
        """What each example adds to this step."""
        return self.sums.contribution

    @property
    def clipper(self) -> Clipper:
        """That of the gradient itself."""
        return self.sums.contribution.clipper

    @property
    def num_drawn(self) -> int | None:
        """The size of the drawn batch, None outside a step."""
        return self.admission.num_drawn

    @property
    def num_added(self) -> int:
        """How many of its examples have come."""
        return self.admission.num_added

    def _part(self) -> int | None:
        return None if self.admission.num_drawn is None else self.num_part

    def expects_losses(self) -> bool:
        """Whether a backward now is of the examples of a step: not outside of one, and not the probe's."""
        return self.admission.num_drawn is not None and self.probing.chosen is None

    def groups(self, contribution: Contribution) -> tuple[Group, ...]:
        """The released vectors of a step of `contribution`."""
        if self._groups is None or self._groups[0] is not contribution:
            self._groups = contribution, contribution.released(self.sums.groups)
        return self._groups[1]

    def bounds_and_sizes(self) -> tuple[list[float], list[int]]:
        """The sensitivity of each group of released vectors, and how many numbers it holds."""
        groups = self.groups(self.contribution)
        return [g.sensitivity for g in groups], [sum(map(self._size, g.names)) for g in groups]

    def _size(self, name: str) -> int:
        count = self.contribution.counts.get(name)
        return self._parameter(name).numel() if count is None else count.size

    def begin(
        self,
        num_drawn: int,
        contribution: Contribution | None = None,
        records: Iterable[int] | None = None,
        *,
        repeats: int = 1,
        two_points: bool = False,
    ) -> None:
        """Start a step on a batch of `num_drawn` examples: `records`, where a contribution asks which they are.

        `contribution` is what each example adds, None: as before. More than one of `repeats` keeps the batch, to sum it
        so often. `two_points` says that each example adds a difference of gradients at two points.
        """
        self.admission.begin(num_drawn, records)
        if contribution is not None:
            self.sums = self._running = replace(self.sums, contribution=contribution)
            self._held = [] if repeats > 1 else None
            self._pairs = two_points
        self.probing.begin()
        self.rehearsing.begin()
        self.tape.turns.renew()

    def before(self, roots: Sequence[Any], grads: Sequence[Any], second_order: bool) -> None:
        """A backward of a loop begins, on the part that was handed out last: see to whose the rows are."""
        self._roots.append(roots)
        ready = self.admission.num_drawn is not None and self.num_part and not self.tape.is_rerunning
        if ready and self.probing.chosen is None:
            self.tape.attribute_below(roots, self.num_part)

    def after(self) -> None:
        """It has ended."""
        self._roots.pop()

    def made(self, roots: Sequence[Any], inputs: Sequence[Any], grads: Sequence[Tensor | None]) -> None:
        """It has made gradients, which are the loop's."""

    @property
    def in_forward(self) -> bool:
        """Whether code of the model runs now."""
        return self.tape.in_forward

    def altered(self) -> None:
        """A hook of the loop has changed a gradient: raise MixesExamples where it is on its way to the model."""
        private = (
            self.admission.num_drawn is not None and not self.tape.is_paused and not self.tape.is_rerunning
        )
        if private and any(reaches(roots, self.tape) for roots in self._roots):
            refuse_altered()

    def discard(self) -> None:
        """Forget what was collected; nothing of it was released."""
        self._forget()
        self.admission.discard()
        self._held = None if self._held is None else []
        self._merging = None if self._merging is None else Merging()
        self.tape.turns.forgive()

    def _forget(self) -> None:
        self.sums.totals.clear()
        if self.checks is not None:
            self.checks.discard()
        if self.sums.contribution.forget is not None:
            self.sums.contribution.forget()

    def end(self) -> None:
        """Leave the step."""
        self._forget()
        self.admission.end()
        self.hold = self.blank = False
        self._held = self._merging = None
        self.tape.turns.renew()

    @contextmanager
    def same_examples(
        self, keep: Sequence[bool] | Tensor | None = None, records: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Merge the backwards inside, and clip and count their examples once at the end."""
        if self._merging is not None:
            raise RuntimeError(
                "expected one same_examples() block at a time; got one inside another; leave one out"
            )
        self.admission.require_drawn()
        self.require_whole()
        self._merging = Merging()
        try:
            yield
            merged, self._merging = self._merging, None
            if merged is not None and merged.num_examples is not None:
                self._expect(merged.num_examples, keep, records)
                merged.hand_over(self._collector(merged.idle))
        finally:
            self._merging = None
            self._running = self.sums
            self.admission.forget_expected()

    def add(
        self,
        losses: Tensor,
        keep: Sequence[bool] | Tensor | None = None,
        records: Sequence[int] | None = None,
    ) -> None:
        """Run the backward of per-example `losses` (B,) and collect the clipped gradients of those in `keep`.

        `records` tells which record each row is, for a contribution that depends on it.

        Guarantees
        ----------
        A row outside `keep` adds exactly nothing, whatever its gradient, and is not counted as a drawn example
        (test_guarantee_a_padded_row_adds_nothing).
        """
        self.admission.require_drawn()
        num_rows = losses.shape[0]
        self.rehearsing.require(num_rows)
        try:
            self._expect(num_rows, keep, records)
            self.tape.attribute([losses], num_rows)
            if not self.probing.losses_done and num_rows > 1:
                self.probing.run([losses], losses=True)
            self._backward(losses.mean() if self.sums.mean else losses.sum())
        finally:
            self.admission.forget_expected()
            self._measuring = None
            self._running = self.sums
        self.admission.require_met()

    def _expect(
        self, num_rows: int, keep: Sequence[bool] | Tensor | None, records: Sequence[int] | None
    ) -> None:
        """Say which of the rows to come are examples, and which records; a block of several backwards says it once."""
        flags = None if keep is None else torch.as_tensor(keep, dtype=torch.bool)
        if flags is not None and (self._merging is not None or flags.shape != (num_rows,)):
            raise ValueError(
                "expected one flag of keep for each loss, outside same_examples(); got another number, or such a "
                "block; pad each backward by itself"
            )
        self.admission.expect(num_rows, None if flags is None else int(flags.sum()))
        self._running = replace(self.sums, keep=flags)
        made = self.contribution.of_records
        if made is not None and self._merging is None:
            contribution = made(self.admission.name(records, num_rows))
            self._running = replace(self._running, contribution=contribution)

    def _backward(self, loss: Tensor) -> None:
        if not self.two_pass or self.blank or self._merging is not None or self._held is not None:
            loss.backward()
            return
        self._measuring = Measuring(self._running)
        loss.backward(retain_graph=True)
        loss.backward()

    def require_whole(self) -> None:
        """Raise RuntimeError where the sum holds a part of some examples' gradients, or a block is open."""
        if self._merging is not None:
            raise RuntimeError(
                "expected same_examples() to end before its sum is used; got a release inside the block, which has "
                "clipped nothing yet; call it after the block"
            )
        if self.admission.unfinished:
            self.admission.require_whole()

    def require_nothing_pending(self) -> None:
        """Raise RuntimeError where gradients of private examples wait for their release."""
        self.require_whole()
        self.admission.require_none_pending()

    def join(self, found: dict[str, SampleGrads], num_examples: int) -> None:
        """Add examples that come as gradients, and not through the model: the canaries of an audited run."""
        held = Held(found, num_examples)
        if self._held is not None:
            self._held.append(held)
            return
        # Paths that were chosen are those of the records.
        sums = replace(self.sums, choices={})
        held.hand_over(Clipping(sums, held.idle, lambda num_examples: None))

    def clipped(self, contribution: Contribution | None = None) -> ClippedSum:
        """The clipped sum of the step, handed over: vectors that no example reached are zero.

        With a batch that is held, `contribution` says what each example adds this time.
        """
        self.require_whole()
        if self._held is not None:
            self._sum_held(contribution or self.contribution)
        groups, totals = self.groups(self.contribution), self.sums.totals
        found = {
            name: totals.pop(name) if name in totals else self._zero(name)
            for group in groups
            for name in group.names
        }
        return ClippedSum(found, math.hypot(*(group.sensitivity for group in groups)), groups)

    def hidden(self) -> dict[str, Tensor]:
        """The sums that are not released, by prefix and name; those that no example reached are left out."""
        left = dict(self.sums.totals)
        self.sums.totals.clear()
        return left

    def _parameter(self, name: str) -> nn.Parameter:
        prefixes = (p for p in self.contribution.clippers if name.startswith(p))
        return next(self.parameters[x] for p in prefixes if (x := name.removeprefix(p)) in self.parameters)

    def _zero(self, name: str) -> Tensor:
        count = self.contribution.counts.get(name)
        if count is None:
            return zero_sum({name: self._parameter(name)}, 0.0).total[name]
        return torch.zeros(count.size, device=next(iter(self.parameters.values())).device)

    def _sum_held(self, contribution: Contribution) -> None:
        self.sums = self._running = replace(self.sums, contribution=contribution)
        for held in self._held or ():
            sums = replace(self.sums, keep=held.keep)
            held.hand_over(Clipping(sums, held.idle, lambda num_examples: None))

    def _begin(self, idle: Idle) -> Collector:
        """The collector of one backward."""
        if self.probing.chosen is not None:
            return self.probing.collector()
        if self.admission.num_drawn is None:
            self.admission.require_drawn()
        if self.checks is not None:
            self.checks.require_proven()
        if self._merging is not None:
            return Gathering(self._merge, self._merging.unit)
        if self._pairs or self._running.contribution.of_records is not None:
            raise RuntimeError(
                "expected the losses of each part as a function, and which records they are of, as this estimator looks at "
                "two points or at each record's past; got a plain backward; call evaluate(lambda: losses, "
                "records=part.indices) in place of loss.backward() or accumulate(losses)"
            )
        self.require_whole()
        if self._measuring is None:
            return self._collector(idle)
        if self._measuring.done:
            return Summing(self._running, self._measuring, self.admission.admit)
        return self._measuring

    def _collector(self, idle: Idle) -> Collector:
        """What clips and adds the examples of one backward.

        Guarantees
        ----------
        Rows that stand in for a draw of nobody add exactly nothing, to any sum, count or memory, whatever their
        gradient (test_guarantee_the_row_of_an_empty_draw_adds_nothing).
        """
        if self.blank:
            return Gathering(self._drop, object())
        if self._held is not None:
            return Gathering(self._hold, object())
        return Clipping(self._running, idle, self.admission.admit)

    def _drop(self, found: dict[str, SampleGrads], num_examples: int) -> None:
        self.admission.admit(num_examples)
        self.admission.admit(None)

    def _hold(self, found: dict[str, SampleGrads], num_examples: int) -> None:
        self.admission.admit(num_examples)
        assert self._held is not None
        self._held.append(Held(found, num_examples, self._running.keep))
        self.admission.admit(None)

    def _merge(self, found: dict[str, SampleGrads], num_examples: int) -> None:
        self.admission.meet(num_examples)
        if self._merging is not None:
            self._merging.take(found, num_examples)
