# SPDX-License-Identifier: Apache-2.0
"""Records that a step may meet, made of ordinary ones: long, short, huge, not a number, and twice the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dpopt.audit.step_checks.case import TrainingStep


def _floats(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def of(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return change(value)
        return value

    return lambda record: pytree.tree_map(of, record)


VARIANTS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda record: record,
    "times 1000": _floats(lambda x: x * 1e3),
    "over 1000": _floats(lambda x: x * 1e-3),
    "negated": _floats(lambda x: -x),
    "zero": _floats(torch.zeros_like),
    "1e30": _floats(lambda x: torch.full_like(x, 1e30) if x.dtype != torch.float16 else x * 1e3),
    "infinite": _floats(lambda x: torch.full_like(x, float("inf"))),
    "nan": _floats(lambda x: torch.full_like(x, float("nan"))),
}
"""Name: what it makes of a record. Only tensors of floats are changed; give other hostile records yourself."""

WILD = ("1e30", "infinite", "nan")


@dataclass(frozen=True)
class Entry:
    """One record of a batch: its place among `records` followed by `hostile`, and what was made of it."""

    place: int
    variant: str = "as it is"


@dataclass(frozen=True)
class Trial:
    """Two neighbouring batches: `batch`, and the same without the entry at `odd`, or with `other` in its place."""

    batch: tuple[Entry, ...]
    odd: int
    other: Entry | None = None
    seed: int = 0

    @property
    def bound(self) -> int:
        """Removing may move the release by one clip norm, replacing by two."""
        return 1 if self.other is None else 2


def entry_of(case: TrainingStep, entry: Entry) -> Any:
    """The record that an entry stands for."""
    pool = [*case.records, *case.hostile]
    return VARIANTS[entry.variant](pool[entry.place % len(pool)])


def both(case: TrainingStep, trial: Trial) -> tuple[list[Any], list[Any]]:
    """The two neighbouring batches of records."""
    whole = [entry_of(case, entry) for entry in trial.batch]
    rest = whole[: trial.odd] + ([] if trial.other is None else [entry_of(case, trial.other)])
    return whole, rest + whole[trial.odd + 1 :]


def trials(case: TrainingStep, *, sizes: Sequence[int], seed: int, same_places: bool) -> list[Trial]:
    """Neighbouring batches of each size; `same_places` keeps every other record at its place, for steps with dropout."""
    source = random.Random(seed)
    made: list[Trial] = []
    for size in sizes:
        for variant in VARIANTS:
            made += _with_one_odd(case, size, variant, source, same_places)
        for variant in ("as it is", "times 1000", "over 1000"):
            made += _all_alike(case, size, variant, source, same_places)
    return made


def _other(case: TrainingStep, source: random.Random, wanted: bool) -> Entry | None:
    """What takes the odd record's place, where it is replaced: another one, or its opposite."""
    pool = len(case.records) + len(case.hostile)
    variant = source.choice(("as it is", "negated", "times 1000"))
    return Entry(source.randrange(pool), variant) if wanted or case.batch_size else None


def _with_one_odd(
    case: TrainingStep, size: int, variant: str, source: random.Random, same_places: bool
) -> list[Trial]:
    """One record of the variant among ordinary ones, removed, or replaced by another."""
    pool = len(case.records) + len(case.hostile)
    made = []
    for number in range(2):
        batch = [Entry(source.randrange(pool)) for _ in range(size)]
        odd = size - 1 if same_places else (0, size - 1)[number]
        place = len(case.records) + number if number < len(case.hostile) else source.randrange(pool)
        batch[odd] = Entry(place, variant)
        other = _other(case, source, same_places and number > 0)
        made.append(Trial(tuple(batch), odd, other, source.randrange(1 << 30)))
    return made


def _all_alike(
    case: TrainingStep, size: int, variant: str, source: random.Random, same_places: bool
) -> list[Trial]:
    """Batches of one variant, of different records and of one record many times."""
    pool = len(case.records) + len(case.hostile)
    one = source.randrange(pool)
    different = tuple(Entry(source.randrange(pool), variant) for _ in range(size))
    odd = size - 1 if same_places else source.randrange(size)
    listed = [(different, odd)]
    if size > 1:
        same = tuple(Entry(one, variant) for _ in range(size - 1))
        apart = Entry((one + 1) % pool, "negated" if variant == "as it is" else variant)
        listed += [((*same, apart), size - 1), ((*same, same[0]), size - 1)]
    return [Trial(batch, at, _other(case, source, False), source.randrange(1 << 30)) for batch, at in listed]
