# SPDX-License-Identifier: Apache-2.0
"""Events as `dp_accounting` states them, in JSON, so that another library can price what a ledger charges.

Its classes are built and its own `to_named_tuple` writes them; reading back builds from its event classes only,
never from whatever a file names.
"""

from collections.abc import Mapping
from typing import Any

from accountants.events import (
    Composed,
    Event,
    FixedSize,
    Gaussian,
    HiddenFeedback,
    NonPrivate,
    OncePerEpoch,
    PoissonSampled,
    Repeated,
    TruncatedPoisson,
)

_WHY = {
    HiddenFeedback: "it has no event for an error that is kept between steps",
    OncePerEpoch: "it has no event for a partition of the records over an epoch",
    TruncatedPoisson: "its truncated sampling fixes the number of records, of which this event knows a bound",
}


class Inexpressible(ValueError):
    """An event that the other library has no words for."""


def to_dp_accounting(event: Event) -> Any:
    """Build the `dp_accounting.DpEvent` of `event`.

    Raises:
        Inexpressible: it has none; the message names the event.
        ModuleNotFoundError: `dp_accounting` is not installed.
    """
    import dp_accounting as other

    match event:
        case NonPrivate() | Gaussian(noise_multiplier=0):
            return other.NonPrivateDpEvent()
        case Gaussian(noise_multiplier=s):
            return other.GaussianDpEvent(s)
        case PoissonSampled(sampling_rate=q, event=inner):
            return other.PoissonSampledDpEvent(q, to_dp_accounting(inner))
        case FixedSize(batch_size=b, num_records=n, event=inner):
            return other.SampledWithoutReplacementDpEvent(n, b, to_dp_accounting(inner))
        case Repeated(event=inner, count=n):
            return other.SelfComposedDpEvent(to_dp_accounting(inner), n)
        case Composed(events=events):
            return other.ComposedDpEvent([to_dp_accounting(inner) for inner in events])
    raise Inexpressible(
        f"events must be among those of dp_accounting; got {event!r}: {_WHY.get(type(event), 'unknown to it')}; "
        "export as json instead"
    )


def dp_accounting_data(event: Event) -> dict[str, object]:
    """Write the `dp_accounting` form of `event` as plain JSON data: its fields, module_name and class_name."""
    return _data(to_dp_accounting(event).to_named_tuple())


def from_dp_accounting_data(data: Mapping[str, Any]) -> Any:
    """Build the `dp_accounting.DpEvent` that `dp_accounting_data` wrote."""
    from dp_accounting import dp_event

    kind = getattr(dp_event, str(data.get("class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, dp_event.DpEvent)):
        raise ValueError(
            f"class_name must name an event of dp_accounting; got {data.get('class_name')!r}; correct the file"
        )
    fields = {key: value for key, value in data.items() if key not in ("module_name", "class_name")}
    return kind(**{key: _built(value) for key, value in fields.items()})


def _data(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {key: _data(item) for key, item in value._asdict().items()}
    return [_data(item) for item in value] if isinstance(value, list | tuple) else value


def _built(value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_dp_accounting_data(value)
    return [_built(item) for item in value] if isinstance(value, list) else value
