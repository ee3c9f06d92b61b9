# SPDX-License-Identifier: Apache-2.0
"""Which datasets are neighbours, and what each mechanism is worth under that relation: proven, or refused.

| relation | D and D' | what its events ask of the sampler |
|---|---|---|
| `add-or-remove-one` | one of them has one record more | nothing depends on the number of records |
| `zero-out-one` | a record of one is empty in the other: it is drawn, and contributes 0 | the length is public |
| `replace-one` | they differ in one record | the length is public |

With contributions of norm <= 1 and s the noise multiplier:

| event | add-or-remove-one | zero-out-one | replace-one |
|---|---|---|---|
| `Gaussian(s)` | s | s | s / 2 |
| `PoissonSampled` | the sampled pair (`accountants.dominating_pairs.connect_the_dots`) | the same | its mirrored pair (`accountants.dominating_pairs.replaced_record`) |
| `TruncatedPoisson` | as Poisson, and a slip | the same | the same |
| `FixedSize` | refused | two pairs (`accountants.dominating_pairs.emptied_record`) | q D at s / 2 (`accountants.dominating_pairs.replaced_record`) |
| `OncePerEpoch` `BY_RECORD` | Gaussian(s) | Gaussian(s) | Gaussian(s / 2) |
| `OncePerEpoch` `BY_POSITION` | refused | Gaussian(s) | Gaussian(s / 2) |
| `HiddenFeedback`, c = C2 / C1 | the shifted pair (`accountants.dominating_pairs.feedback_step`) | the same | Gaussian(s / (2 + 2 c)) |

**Slip.** The delta that cutting costs besides: `accountants.dominating_pairs.truncated_poisson`.

**Once per epoch.** Given the assignment, the record is in one batch: the steps before it are alike, that one is a
Gaussian, and those after it look at outputs (adaptive parallel composition). The assignment of the others has
the same law in D and D', so mixing over it costs nothing (joint convexity). By position that fails where a record is
added: all later ones may move to another batch.

**Fixed size.** When a record is added, n changes and with it the rate, so that no public n describes both datasets.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from accountants.curve import ADD_OR_REMOVE
from accountants.dominating_pairs.sampled_step import EMPTIED, FIXED, POISSON, SHIFTED, Step
from accountants.dominating_pairs.truncated_poisson import overflow
from accountants.events import (
    BY_POSITION,
    Event,
    FixedSize,
    Gaussian,
    HiddenFeedback,
    Leaf,
    NonPrivate,
    OncePerEpoch,
    PoissonSampled,
    TruncatedPoisson,
    UnpricedEvent,
)
from accountants.nests import charged_under, leaves

ADD_REMOVE, ZERO_OUT, REPLACE = "add-or-remove-one", "zero-out-one", "replace-one"

RELATIONS: Mapping[str, str] = {
    ADD_REMOVE: ADD_OR_REMOVE,
    ZERO_OUT: "neighbours differ by emptying one record, which then contributes nothing; their length is public",
    REPLACE: "neighbours differ by replacing one record; their length is public",
}
"""The relations by name, each with what it says on a bound."""

Pair = Gaussian | PoissonSampled | Step | NonPrivate
"""What is left to compose: under add-or-remove-one, or a `Step` of another kind."""

Pairs = tuple[tuple[Pair, int], ...]


_LEAST_NOISE, _MOST_NOISE, _LEAST_RATE = 1e-150, 1e100, 1e-100


class Priced(NamedTuple):
    """Pairs that dominate an event's mechanisms, with counts, and the delta that is lost besides."""

    pairs: Pairs
    slip: float


def check_relation(relation: str) -> None:
    """Refuse a relation that is none."""
    if relation not in RELATIONS:
        raise ValueError(
            f"relation must be one of {sorted(RELATIONS)}; got {relation!r}; say who is protected"
        )


def relation_named(text: str) -> str:
    """Return the name of a relation that is told by name or in the words of `RELATIONS`; others as they are."""
    return next((name for name, words in RELATIONS.items() if text == words), text)


def require_charged_under(event: Event, relation: str) -> None:
    """Refuse to price under `relation` what was charged under another one.

    Raises:
        UnpricedEvent: a part of `event` comes from a ledger of another relation.
    """
    others = [mark for mark in charged_under(event) if mark != relation]
    if others:
        raise UnpricedEvent(
            f"the charges of a ledger must be priced under its own relation, {others[0]}; got {relation}; pass "
            f"relation={others[0]!r} to the accountant, or ask ledger_bound()"
        )


def priced(event: Event, relation: str) -> Priced:
    """Find for each mechanism in `event` the pair that dominates it under `relation`.

    Raises:
        UnpricedEvent: nothing is proven for a mechanism under this relation, and the message names it; or the event
            was charged under another one.

    Guarantees
    ----------
    delta(e) of the event, under adaptive composition, is at most that of the composed pairs plus `slip`
    (Zhu, Dong, Wang 2022, arXiv:2106.08567, theorem 10; module docstring).
    """
    check_relation(relation)
    require_charged_under(event, relation)
    counts: Counter[Pair] = Counter()
    slip = 0.0
    for leaf, count in leaves(event):
        pair, lost = _PRICES[type(leaf)](leaf, relation)
        counts[_in_range(pair)] += count
        slip += count * lost * (1 + 1e-12)
    return Priced(merged(counts), min(1.0, slip))


def extreme(pair: object) -> bool:
    """Tell a mechanism beyond what is computed: noise beyond 1e100, or below 1e-150, or a rate below 1e-100."""
    noise = getattr(getattr(pair, "event", pair), "noise_multiplier", 1.0)
    return not (_LEAST_NOISE <= noise <= _MOST_NOISE and getattr(pair, "sampling_rate", 1.0) >= _LEAST_RATE)


def _in_range(pair: Pair) -> Pair:
    """Replace an extreme pair by one that leaks more, with numbers whose squares are numbers."""
    if not extreme(pair):
        return pair
    step = as_step(pair)
    if step.noise_multiplier < _LEAST_NOISE:
        return NonPrivate()
    noise, rate = min(step.noise_multiplier, _MOST_NOISE), max(step.sampling_rate, _LEAST_RATE)
    if isinstance(pair, Step):
        return replace(pair, noise_multiplier=noise, sampling_rate=rate)
    return Gaussian(noise) if isinstance(pair, Gaussian) else PoissonSampled(rate, Gaussian(noise))


def as_step(pair: Pair) -> Step:
    """Write a sampled `pair` as a step."""
    match pair:
        case Step():
            return pair
        case PoissonSampled(sampling_rate=q, event=Gaussian(noise_multiplier=s)):
            return Step(s, q)
        case Gaussian(noise_multiplier=s):
            return Step(s, 1.0)
        case _:
            raise AssertionError(f"no step is {pair!r}")


def merged(counts: Mapping[Pair, int]) -> Pairs:
    """Write counted pairs in canonical order."""
    return tuple(sorted(counts.items(), key=lambda item: repr(item[0])))


def _gaussian(leaf: Gaussian, relation: str) -> tuple[Pair, float]:
    return (Gaussian(leaf.noise_multiplier / 2) if relation == REPLACE else leaf), 0.0


def _poisson(leaf: PoissonSampled, relation: str) -> tuple[Pair, float]:
    return (_replaced(leaf.sampling_rate, leaf.event, POISSON) if relation == REPLACE else leaf), 0.0


def _truncated(leaf: TruncatedPoisson, relation: str) -> tuple[Pair, float]:
    if leaf.sampling_rate == 1:
        return NonPrivate(), 0.0
    return _poisson(PoissonSampled(leaf.sampling_rate, leaf.event), relation)[0], overflow(leaf)


def _fixed_size(leaf: FixedSize, relation: str) -> tuple[Pair, float]:
    if relation == ADD_REMOVE:
        raise _refused(leaf, relation, "its rate changes with the number of records; use Poisson sampling")
    if leaf.batch_size == leaf.num_records:
        return _price_inner(leaf.event, relation)
    pair = EMPTIED if relation == ZERO_OUT else FIXED
    return _replaced(math.nextafter(leaf.batch_size / leaf.num_records, 1.0), leaf.event, pair), 0.0


def _once(leaf: OncePerEpoch, relation: str) -> tuple[Pair, float]:
    if relation == ADD_REMOVE and leaf.assignment == BY_POSITION:
        raise _refused(leaf, relation, "a new record moves others between batches; use balls in bins")
    return _price_inner(leaf.event, relation)


def _hidden(leaf: HiddenFeedback, relation: str) -> tuple[Pair, float]:
    s, q, c = leaf.noise_multiplier, leaf.sampling_rate, leaf.feedback
    if relation == REPLACE:  # all coins shown
        return Gaussian(s / (2 + 2 * c) * (1 - 1e-15)), 0.0
    return (Gaussian(s / (1 + 2 * c) * (1 - 1e-15)) if q == 1 else Step(s, q, SHIFTED, 2 * c)), 0.0


def _price_inner(event: Event, relation: str) -> tuple[Pair, float]:
    assert isinstance(event, Gaussian)  # leaves() lets nothing else through
    return _gaussian(event, relation)


def _replaced(rate: float, event: Event, pair: str) -> Step:
    assert isinstance(event, Gaussian)
    return Step(event.noise_multiplier, rate, pair)


def _free(leaf: NonPrivate, relation: str) -> tuple[Pair, float]:
    return leaf, 0.0


def _refused(leaf: Leaf, relation: str, why: str) -> UnpricedEvent:
    return UnpricedEvent(
        f"an event must have a proven price under {relation}; got {leaf!r}: {why}, or a ledger and an accountant of "
        f"another relation ({ZERO_OUT}, {REPLACE})"
    )


_PRICES: Mapping[type[Leaf], Callable[[Any, str], tuple[Pair, float]]] = {
    Gaussian: _gaussian,
    PoissonSampled: _poisson,
    TruncatedPoisson: _truncated,
    FixedSize: _fixed_size,
    OncePerEpoch: _once,
    HiddenFeedback: _hidden,
    NonPrivate: _free,
}
