# SPDX-License-Identifier: Apache-2.0
"""The faults: what goes wrong, where in a step, and how the training loop answers. Seeded, so that each can be run again."""

import random
from dataclasses import dataclass

STEPS = 4
"""Steps that a run takes when nothing goes wrong."""

POINTS = (
    "opening",
    "before charge",
    "half written",
    "before sync",
    "after sync",
    "before noise",
    "during noise",
    "before grad",
    "during grad",
    "between steps",
    "in forward",
    "in backward",
)
"""Where a fault strikes, in the order of a step."""

STORAGE = ("write", "half write", "fdatasync")
HARMS = ("removed", "replaced", "emptied")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: `kind` and the place `point` at step `step`; `go_on` says that the loop catches and goes on."""

    kind: str
    point: str
    step: int
    go_on: bool
    number: int
    seed: int


_WHERE = {
    "kill": POINTS,
    "kill at random": ("timer",),
    "term at random": ("timer",),
    "interrupt at random": ("timer",),
    "out of memory": (
        "in forward",
        "in backward",
        "before noise",
        "during noise",
        "before grad",
        "during grad",
    ),
    "interrupt": tuple(point for point in POINTS if point != "half written"),
    "exception": ("in forward", "in backward", "between steps", "before noise"),
    "disk full": STORAGE,
    "torn line": ("last record",),
    "second run": ("while running", "at the start"),
    "fork": ("in forward", "before charge", "between steps"),
    "bad example": ("nan", "inf", "huge"),
    "break": ("between steps",),
    "clock jump": ("always",),
    "ledger taken away": HARMS,
}
KINDS = tuple(_WHERE)

_WEIGHTS = {"kill": 3, "kill at random": 3, "torn line": 4, "interrupt": 2, "interrupt at random": 2}


def faults(first: int, count: int, seed: int) -> list[Fault]:
    """Faults `first` to `first + count` in a mixed order; each kind and place comes up, if `count` allows."""
    source = random.Random(seed)
    names = [kind for kind in KINDS for _ in range(_WEIGHTS.get(kind, 1))]
    turn = dict.fromkeys(KINDS, 0)
    made = []
    for number in range(first + count):
        kind = names[number % len(names)]
        places = _WHERE[kind]
        point = places[turn[kind] % len(places)]
        turn[kind] += 1
        step = source.randrange(STEPS - 1)
        made.append(Fault(kind, point, step, source.random() < 0.5, number, source.randrange(1 << 30)))
    chosen = made[first:]
    source.shuffle(chosen)
    return chosen
