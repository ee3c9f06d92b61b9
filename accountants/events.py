# SPDX-License-Identifier: Apache-2.0
"""What was released, as data: the events an accountant prices.

The unit of privacy is one record; neighbouring datasets differ by *adding or removing one record*. Every
mechanism is stated for sensitivity one: `noise_multiplier` is the standard deviation of the noise divided by
the sensitivity (in L2 norm) of what it is added to.

| event | the mechanism, on a dataset D |
|---|---|
| `Gaussian(s)` | f(D) + N(0, s^2 I), with f(D), f(D') at L2 distance <= 1 for neighbours |
| `PoissonSampled(q, e)` | e on a subset of D that holds each record independently with probability q |
| `Repeated(e, n)` | n independent runs of e, each may look at the earlier outputs |
| `Composed(events)` | all of them, one after the other, each may look at the earlier outputs |
| `NonPrivate()` | anything: its epsilon is infinite |

An event says nothing about *how* the numbers (s, q, n) were chosen; a bound is valid when they were fixed
before the data were seen, unless the accountant says otherwise (`Accountant.adaptive`).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields


class UnpricedEvent(ValueError):
    """An event for which no price is known; the message names the leaf and its place in the nest."""


def _require(ok: bool, name: str, expected: str, got: object, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {expected}; got {got!r}; {remedy}")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_event(value: object) -> bool:
    return isinstance(value, Gaussian | PoissonSampled | Repeated | Composed | NonPrivate)


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Gaussian noise of standard deviation `noise_multiplier` on a query of L2 sensitivity one.

    A `noise_multiplier` of 0 is allowed and priced as infinite.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        s = self.noise_multiplier
        ok = _is_real(s) and s >= 0
        _require(ok, "noise_multiplier", "a finite number >= 0", s, "pass noise std / sensitivity")
        object.__setattr__(self, "noise_multiplier", float(s))


@dataclass(frozen=True, slots=True)
class PoissonSampled:
    """`event` on a Poisson sample: each record takes part independently with probability `sampling_rate`."""

    sampling_rate: float
    event: "Event"

    def __post_init__(self) -> None:
        q = self.sampling_rate
        ok = _is_real(q) and 0 <= q <= 1
        _require(ok, "sampling_rate", "a probability in [0, 1]", q, "pass batch size / dataset size")
        _require(
            _is_event(self.event), "event", "an event", self.event, "wrap a mechanism, e.g. Gaussian(1.0)"
        )
        object.__setattr__(self, "sampling_rate", float(q))


@dataclass(frozen=True, slots=True)
class Repeated:
    """`count` runs of `event` with fresh randomness."""

    event: "Event"
    count: int

    def __post_init__(self) -> None:
        n = self.count
        ok = isinstance(n, int) and not isinstance(n, bool) and n >= 0
        _require(ok, "count", "an integer >= 0", n, "pass the number of runs as an int")
        _require(
            _is_event(self.event), "event", "an event", self.event, "wrap a mechanism, e.g. Gaussian(1.0)"
        )


@dataclass(frozen=True, slots=True)
class Composed:
    """All of `events`, on the same dataset. The empty composition releases nothing and costs nothing."""

    events: "tuple[Event, ...]"

    def __post_init__(self) -> None:
        ok = isinstance(self.events, tuple)
        _require(ok, "events", "a tuple of events", self.events, "pass tuple(events)")
        for i, event in enumerate(self.events):
            _require(
                _is_event(event), f"events[{i}]", "an event", event, "wrap it in NonPrivate() if unknown"
            )


@dataclass(frozen=True, slots=True)
class NonPrivate:
    """A release without any privacy guarantee: epsilon is infinite for every delta below one."""


Leaf = Gaussian | PoissonSampled | NonPrivate
Event = Gaussian | PoissonSampled | Repeated | Composed | NonPrivate

_KINDS = {kind.__name__: kind for kind in (Gaussian, PoissonSampled, Repeated, Composed, NonPrivate)}

_BUILD: Mapping[str, Callable[..., Event]] = _KINDS


def to_dict(event: Event) -> dict[str, object]:
    """Write the event as plain JSON data: its fields, and its class name under `kind`."""
    if not _is_event(event):
        raise UnpricedEvent(f"an event must be one of {', '.join(_KINDS)}; got {event!r}; use NonPrivate()")
    data: dict[str, object] = {"kind": type(event).__name__}
    for field in fields(event):
        value = getattr(event, field.name)
        if field.name == "events":
            data[field.name] = [to_dict(item) for item in value]
        else:
            data[field.name] = to_dict(value) if field.name == "event" else value
    return data


def from_dict(data: Mapping[str, object]) -> Event:
    """Read the event that `to_dict` wrote.

    Raises:
        ValueError: an unknown kind, an unknown or a missing field, or a value out of range.
    """
    _require(isinstance(data, Mapping), "an event", "a mapping with a 'kind'", data, "pass to_dict's output")
    name = data.get("kind")
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(
            f"kind must be one of {', '.join(_KINDS)}; got {name!r}; upgrade or correct the record"
        )
    expected = {field.name for field in fields(kind)}
    given = set(data) - {"kind"}
    if given != expected:
        raise ValueError(
            f"{name} must have exactly the fields {sorted(expected)}; got {sorted(given)}; "
            "remove the unknown ones and add the missing ones"
        )
    values = {key: _value(data[key]) for key in expected}
    return _BUILD[kind.__name__](**values)


def _value(value: object) -> object:
    if isinstance(value, Mapping):
        return from_dict(value)
    if isinstance(value, list):
        return tuple(from_dict(item) for item in value)
    return value


def leaves(event: Event) -> tuple[tuple[Leaf, int], ...]:
    """List the mechanisms inside `event` with their total counts, equal ones merged, in a canonical order.

    The order of composition does not matter to any bound, so it is not kept. Sampling at rate 1 is dropped,
    events that take no part (rate 0, count 0) vanish, and no noise is written as `NonPrivate`.

    Raises:
        UnpricedEvent: sampling around anything but one Gaussian; the message gives the path to the leaf.
    """
    counts: Counter[Leaf] = Counter()
    for leaf, count in _walk(event, 1, "event"):
        if count:
            counts[leaf] += count
    return tuple(sorted(counts.items(), key=lambda item: repr(item[0])))


def _walk(event: Event, count: int, path: str) -> Iterator[tuple[Leaf, int]]:
    match event:
        case Gaussian(noise_multiplier=s):
            yield (Gaussian(s) if s > 0 else NonPrivate()), count
        case NonPrivate():
            yield event, count
        case PoissonSampled(sampling_rate=q, event=inner):
            yield from _walk_sampled(q, inner, count, path)
        case Repeated(event=inner, count=n):
            yield from _walk(inner, count * n, f"{path}.Repeated.event")
        case Composed(events=events):
            for i, inner in enumerate(events):
                yield from _walk(inner, count, f"{path}.Composed.events[{i}]")
        case _:
            raise UnpricedEvent(
                f"{path} must be an event; got {event!r}; use NonPrivate() for an unknown release"
            )


def _walk_sampled(q: float, inner: Event, count: int, path: str) -> Iterator[tuple[Leaf, int]]:
    match inner:
        case _ if q == 1:
            yield from _walk(inner, count, f"{path}.PoissonSampled.event")
        case _ if q == 0:
            return
        case NonPrivate() | Gaussian(noise_multiplier=0):
            yield NonPrivate(), count
        case Gaussian():
            yield PoissonSampled(q, inner), count
        case _:
            raise UnpricedEvent(
                f"{path}.PoissonSampled.event must be a Gaussian; got {inner!r}; draw a fresh sample for each "
                "release (Repeated outside PoissonSampled), or merge the releases into one Gaussian"
            )
