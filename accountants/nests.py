# SPDX-License-Identifier: Apache-2.0
"""What is inside a nest of events: its mechanisms with their counts, and how it is written for people.

A nest is gone down level by level, the same object once, so that neither its depth nor parts that it repeats cost time.
"""

from collections import Counter
from collections.abc import Iterator

from accountants.events import (
    DEEPEST,
    MOST,
    Composed,
    Event,
    FixedSize,
    Gaussian,
    HiddenFeedback,
    Leaf,
    NonPrivate,
    OncePerEpoch,
    PoissonSampled,
    Repeated,
    TruncatedPoisson,
    UnpricedEvent,
)


def shown(event: object, depth: int = 4) -> str:
    """Write an event for people: cut short where it is deep or long, as `repr` would not be."""
    match event:
        case Composed(events=events) if len(events) > 9:
            return f"Composed of {len(events)} events"
        case Composed(events=events):
            inner = ", ".join("..." if depth == 0 else shown(part, depth - 1) for part in events)
            return f"Composed(({inner}))"
        case Repeated(event=inner, count=n):
            times = n if n < 10**18 else f"{float(n):.3g}"
            return f"Repeated({'...' if depth == 0 else shown(inner, depth - 1)}, {times})"
        case PoissonSampled() | TruncatedPoisson() | FixedSize() | OncePerEpoch() if not isinstance(
            event.event, Gaussian
        ):
            return f"{type(event).__name__}(of {'...' if depth == 0 else shown(event.event, depth - 1)})"
        case _:
            return repr(event)


def leaves(event: Event) -> tuple[tuple[Leaf, int], ...]:
    """List the mechanisms inside `event` with their total counts, equal ones merged, in a canonical order.

    The order of composition does not matter to any bound, so it is not kept. Sampling at rate 1 is dropped,
    events that take no part (rate 0, count 0) vanish, and no noise is written as `NonPrivate`.

    Raises:
        UnpricedEvent: sampling around anything but one Gaussian, and the message gives the path to the leaf; a nest
            deeper than twice `DEEPEST`; or more runs of one mechanism than a float holds.
    """
    counts: Counter[Leaf] = Counter()
    for level in _levels(event):
        for item, path, count in level:
            leaf = _leaf(item, path)
            if leaf is not None and count:
                counts[leaf] += count
    if any(count > MOST for count in counts.values()):
        raise UnpricedEvent(
            "the runs of one mechanism must be at most 1e308; got more, counts of a nest multiplied; lower a count"
        )
    return tuple(sorted(counts.items(), key=lambda item: repr(item[0])))


def charged_under(event: Event) -> tuple[str, ...]:
    """List the relations under which parts of `event` were charged, each once."""
    marks = (item.relation for level in _levels(event) for item, *_ in level if isinstance(item, Composed))
    return (*dict.fromkeys(mark for mark in marks if mark is not None),)


_Level = tuple[tuple[object, str, int], ...]


def _levels(event: object) -> Iterator[_Level]:
    """Go down a nest level by level: each event with its path and how often it runs, the same object once."""
    level: _Level = ((event, "event", 1),)
    for _ in range(2 * DEEPEST):
        yield level
        below: dict[int, tuple[object, str, int]] = {}
        for outer, path, count in level:
            for inner, where, times in _inside(outer, path):
                known = below.get(id(inner), (inner, where, 0))
                below[id(inner)] = (inner, known[1], known[2] + count * times)
        level = tuple(below.values())
        if not level:
            return
    raise UnpricedEvent(
        f"events must be nested at most {2 * DEEPEST} deep; got a deeper nest; count runs by one Repeated, and compose "
        "side by side"
    )


def _inside(event: object, path: str) -> Iterator[tuple[object, str, int]]:
    """The events that `event` runs, with their paths and how often."""
    match event:
        case Composed(events=events):
            yield from ((inner, f"{path}.Composed.events[{i}]", 1) for i, inner in enumerate(events))
        case Repeated(event=inner, count=n):
            yield inner, f"{path}.Repeated.event", n
        case PoissonSampled(sampling_rate=1, event=inner):
            yield inner, f"{path}.PoissonSampled.event", 1
        case TruncatedPoisson(sampling_rate=1, max_batch_size=m, num_records=n, event=inner) if m >= n:
            yield inner, f"{path}.TruncatedPoisson.event", 1


def _leaf(event: object, path: str) -> Leaf | None:
    """The mechanism that `event` is; None where it is made of others, or takes no part."""
    match event:
        case (
            PoissonSampled(sampling_rate=0)
            | TruncatedPoisson(sampling_rate=0)
            | HiddenFeedback(sampling_rate=0)
        ):
            return None
        case Gaussian(noise_multiplier=0) | HiddenFeedback(noise_multiplier=0):
            return NonPrivate()
        case Gaussian() | HiddenFeedback() | NonPrivate():
            return event
        case PoissonSampled(sampling_rate=1) | Repeated() | Composed():
            return None
        case TruncatedPoisson(max_batch_size=m, num_records=n) if m >= n:
            return _leaf(PoissonSampled(event.sampling_rate, event.event), path)
        case PoissonSampled() | TruncatedPoisson() | FixedSize() | OncePerEpoch():
            return _sampled(event, path)
        case _:
            raise UnpricedEvent(
                f"{path} must be an event; got {event!r}; use NonPrivate() for an unknown release"
            )


def _sampled(event: PoissonSampled | TruncatedPoisson | FixedSize | OncePerEpoch, path: str) -> Leaf:
    match event.event:
        case NonPrivate() | Gaussian(noise_multiplier=0):
            return NonPrivate()
        case Gaussian():
            return event
        case HiddenFeedback() as inner:
            raise UnpricedEvent(
                f"{path}.{type(event).__name__}.event must be a Gaussian; got {shown(inner)}, whose error is shared by all "
                "steps and comes back whoever is sampled: nothing amplifies it; charge HiddenFeedback itself, which "
                "holds the sampling rate of its records"
            )
        case inner:
            raise UnpricedEvent(
                f"{path}.{type(event).__name__}.event must be a Gaussian; got {shown(inner)}; draw a fresh sample for each "
                "release (Repeated outside the sampling), or merge the releases into one Gaussian"
            )
