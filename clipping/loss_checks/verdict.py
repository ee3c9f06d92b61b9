# SPDX-License-Identifier: Apache-2.0
"""What a walk has to have shown before a loss may be clipped, and what has to be the same in every batch.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor

from clipping.errors import MixesExamples
from clipping.loss_checks.operations.arithmetic import complete
from clipping.loss_checks.operations.state import Alone, Facts, State, Total, Unproven, away

REMEDY = (
    "pass the losses of the examples, shape (B,), to engine.backward(losses), each normalised by numbers of its own "
    "example alone"
)
_CLOSE = 1e-5


def refuse_mixing(found: Unproven) -> None:
    """Raise MixesExamples, with what was found and what to do."""
    what = "brings examples together" if found.shown else "cannot be shown to keep examples apart"
    raise MixesExamples(
        f"expected a loss that is the mean or the sum of one loss for each example; got one that {what}: "
        f"{found.reason}; {found.remedy or REMEDY}"
    )


def required(facts: Facts, state: State) -> Total:
    """The state of a loss that is a sum over the examples, each by itself; raises MixesExamples or ValueError."""
    if isinstance(state, Alone):
        state = complete(facts, state.factors)
    if isinstance(state, Unproven):
        refuse_mixing(state)
    if not isinstance(state, Total):
        refuse_mixing(Unproven("a loss of some of the examples, or not summed over them", shown=False))
    assert isinstance(state, Total)
    powers = [factor.power for factor in state.factors if factor.scale]
    if facts.mean and any(power > -1 for power in powers):
        raise ValueError(
            "expected a loss that is the mean over the examples, as loss_reduction says; got a sum, or a division by "
            'another number than that of the examples; divide by it, or say loss_reduction="sum", or '
            + REMEDY
        )
    if not facts.mean and any(power < 0 for power in powers):
        raise ValueError(
            "expected a loss that is the sum over the examples, as loss_reduction says; got a mean, which would scale "
            'each example by the size of its batch; use reduction="sum", or loss_reduction="mean"'
        )
    return state


class Constants:
    """The numbers in each loss of a run, by the operations that it is made of: they must never change."""

    def __init__(self) -> None:
        self._numbers: dict[object, list[float]] = {}
        self._tensors: dict[object, list[Tensor]] = {}

    def require(self, number: int, facts: Facts, total: Total) -> None:
        """Raise MixesExamples where a number is another than in an earlier batch; what is on a device is put off.

        The backward is number `number` of its batch: several may be made of the same operations.
        """
        key = number, frozenset(facts.names)
        shift = 1 if facts.mean else 0
        values = [f._replace(power=f.power + shift).value(facts.num_examples) for f in total.factors]
        found = _distinct(values + facts.constants)
        tensors = self._tensors.setdefault(key, [x.clone() for x in facts.tensors])
        same = _close(self._numbers.setdefault(key, found), found)
        if not same or [x.shape for x in tensors] != [x.shape for x in facts.tensors]:
            refuse_changed()
        for known, value in zip(tensors, facts.tensors, strict=True):
            changed = ((known - value).abs() > _CLOSE * known.abs()).any()
            if away(changed):
                facts.flags.append(changed)
            elif bool(changed):
                refuse_changed()


class Counted:
    """Numbers in the losses (B,) of a run that were counted in the batch, by the operations the losses are made of.

    Numbers that agree with counts by chance do so now and then; one that is a count agrees always. Three that differ are
    enough.
    """

    def __init__(self) -> None:
        self._known: dict[frozenset[str], set[int] | None] = {}

    def require(self, facts: Facts, total: Total, counted: Container[int]) -> None:
        """Raise MixesExamples where they are."""
        scales = [abs(factor.scale) for factor in total.factors if factor.scale] + facts.constants
        near = [x for scale in scales if scale for x in (scale, 1 / scale) if abs(x - 1) > _CLOSE]
        whole = {round(x) for x in near if x > 1 and abs(x - round(x)) < _CLOSE * x}
        known = self._known.setdefault(frozenset(facts.names), set())
        if known is None or not near:
            return
        found = {x for x in whole if x in counted}
        if not found:  # a number of another kind
            self._known[frozenset(facts.names)] = None
            return
        known |= found
        if len(known) > 2:
            refuse_mixing(
                Unproven("a number that was counted in the batch (labels, a selection, a mask)", shown=True)
            )


def refuse_changed() -> None:
    """Raise MixesExamples."""
    raise MixesExamples(
        "expected the numbers in a loss to be the same in every batch; got another factor, divisor, length or constant "
        "than in an earlier one, as when a loss is divided by a count of labels, tokens or positions, or by something "
        f"that the batch or its padding decides; {REMEDY}, which may also change a factor by a public schedule"
    )


def _distinct(values: list[float]) -> list[float]:
    found: list[float] = []
    for value in sorted(values):
        if not found or abs(value - found[-1]) > _CLOSE * abs(value):
            found.append(value)
    return found


def _close(known: list[float], found: list[float]) -> bool:
    return len(known) == len(found) and all(
        abs(a - b) <= _CLOSE * max(abs(a), abs(b)) for a, b in zip(known, found, strict=True)
    )
