# SPDX-License-Identifier: Apache-2.0
"""Events as plain JSON data, and back: what stands in a ledger."""

from collections.abc import Callable, Mapping
from dataclasses import fields

from accountants.events import DEEPEST, KINDS, Composed, Event, UnpricedEvent, is_event

_BUILD: Mapping[str, Callable[..., Event]] = KINDS
_OPTIONAL = {"relation"}
_LARGEST = 100_000


def to_dict(event: Event) -> dict[str, object]:
    """Write the event as plain JSON data: its fields, and its class name under `kind`.

    Raises:
        UnpricedEvent: it is no event, nested deeper than `events.DEEPEST`, or made of more than 100,000 events.
    """
    if not is_event(event):
        raise UnpricedEvent(f"an event must be one of {', '.join(KINDS)}; got {event!r}; use NonPrivate()")
    require_small(event)
    return _data(event)


def require_small(event: Event) -> None:
    """Refuse an event that is too deep or too large to be kept.

    Raises:
        UnpricedEvent: it is nested deeper than `events.DEEPEST`, or made of more than 100,000 events.
    """
    if _size(event, DEEPEST, {}) > _LARGEST:
        raise UnpricedEvent(
            f"an event must be made of at most {_LARGEST} events to be charged; got more; count runs by Repeated"
        )


def _size(event: Event, left: int, known: dict[int, int]) -> int:
    """How many events `event` is made of; the same object is gone through once."""
    if left == 0:
        raise UnpricedEvent(
            f"events must be nested at most {DEEPEST} deep; got a deeper nest; count runs by one Repeated"
        )
    if id(event) not in known:
        inner = getattr(event, "event", None)
        parts = event.events if isinstance(event, Composed) else () if inner is None else (inner,)
        known[id(event)] = 1 + sum(_size(part, left - 1, known) for part in parts)
    return known[id(event)]


def _data(event: Event) -> dict[str, object]:
    data: dict[str, object] = {"kind": type(event).__name__}
    for field in fields(event):
        value = getattr(event, field.name)
        if field.name == "events":
            data[field.name] = [_data(item) for item in value]
        elif field.name == "event":
            data[field.name] = _data(value)
        elif field.name not in _OPTIONAL or value is not None:
            data[field.name] = value
    return data


def from_dict(data: Mapping[str, object]) -> Event:
    """Read the event that `to_dict` wrote.

    Raises:
        ValueError: an unknown kind, an unknown or a missing field, a value out of range, or too deep a nest.
    """
    return _event(data, DEEPEST)


def _event(data: object, left: int) -> Event:
    if not isinstance(data, Mapping):
        raise ValueError(
            f"an event must be a mapping with a 'kind'; got a {type(data).__name__}; pass to_dict's output"
        )
    name = data.get("kind")
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(
            f"kind must be one of {', '.join(KINDS)}; got {name!r}; upgrade or correct the record"
        )
    known = {field.name for field in fields(kind)}
    given = set(data) - {"kind"}
    if not known - _OPTIONAL <= given <= known:
        raise ValueError(
            f"{name} must have exactly the fields {sorted(known - _OPTIONAL)}; got {sorted(map(str, given))}; "
            "remove the unknown ones and add the missing ones"
        )
    if left == 0:
        raise ValueError(
            f"events must be nested at most {DEEPEST} deep; got a deeper nest; count runs by one Repeated"
        )
    return _BUILD[kind.__name__](**{key: _value(data[key], left - 1) for key in given})


def _value(value: object, left: int) -> object:
    if isinstance(value, Mapping):
        return _event(value, left)
    if isinstance(value, list):
        return tuple(_event(item, left) for item in value)
    return value
