# SPDX-License-Identifier: Apache-2.0
"""What was released, as data: the events an accountant prices.

A mechanism is stated for records that contribute at most one: `noise_multiplier` is the standard deviation of
the noise divided by the largest L2 norm of one record's contribution to the sum it is added to. What that is
worth depends on which datasets are neighbours, which the accountant is told (`accountants.relations`).

| event | the mechanism, on a dataset D |
|---|---|
| `Gaussian(s)` | f(D) + N(0, s^2 I), f a sum of one vector of L2 norm <= 1 for each record |
| `PoissonSampled(q, e)` | e on a subset of D that holds each record independently with probability q |
| `TruncatedPoisson(q, m, n, e)` | the same, cut to m records chosen evenly; D has at most n records |
| `FixedSize(b, n, e)` | e on b of the n records of D, chosen evenly without replacement |
| `OncePerEpoch(k, how, e)` | k runs of e, on the parts of a partition of D (`BY_RECORD`, `BY_POSITION`) |
| `HiddenFeedback(q, s, c, r)` | a Poisson sample's clipped sum, a clipped hidden error that the records left, noise |
| `Repeated(e, n)` | n independent runs of e, each may look at the earlier outputs |
| `Composed(events)` | all of them, one after the other, each may look at the earlier outputs |
| `NonPrivate()` | anything: its epsilon is infinite |

An event says nothing about *how* the numbers (s, q, n) were chosen; a bound is valid when they were fixed
before the data were seen, unless the accountant says otherwise (`Accountant.adaptive`).
"""

import sys
from dataclasses import dataclass, field


class UnpricedEvent(ValueError):
    """An event for which no price is known; the message names the leaf and its place in the nest."""


MOST = sys.float_info.max
"""The largest number of an event: what a float holds."""
DEEPEST = 100
"""How deep one charge may be nested; twice as deep what is made of charges."""


def require(ok: bool, name: str, expected: str, got: object, remedy: str) -> None:
    """Raise ValueError in three parts unless `ok`."""
    if not ok:
        if isinstance(got, int) and abs(got) > MOST:
            raise ValueError(
                f"{name} must be {expected}, at most 1e308; got an integer of {got.bit_length()} bits; {remedy}"
            )
        raise ValueError(f"{name} must be {expected}; got {got!r}; {remedy}")


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST


def is_event(value: object) -> bool:
    """Tell whether `value` is an event."""
    return type(value) in KINDS.values()


def _check_rate(rate: object) -> None:
    ok = isinstance(rate, int | float) and _is_real(rate) and 0 <= rate <= 1
    require(ok, "sampling_rate", "a probability in [0, 1]", rate, "pass batch size / dataset size")


def _check_positive(value: object, name: str) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST
    require(ok, name, "an integer >= 1", value, "pass a public number")


def _check_event(event: object) -> None:
    require(is_event(event), "event", "an event", event, "wrap a mechanism, e.g. Gaussian(1.0)")


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Gaussian noise of standard deviation `noise_multiplier` on a query of L2 sensitivity one.

    A `noise_multiplier` of 0 is allowed and priced as infinite.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        s = self.noise_multiplier
        ok = _is_real(s) and s >= 0
        require(ok, "noise_multiplier", "a finite number >= 0", s, "pass noise std / sensitivity")
        object.__setattr__(self, "noise_multiplier", float(s))


@dataclass(frozen=True, slots=True)
class PoissonSampled:
    """`event` on a Poisson sample: each record takes part independently with probability `sampling_rate`."""

    sampling_rate: float
    event: "Event"

    def __post_init__(self) -> None:
        _check_rate(self.sampling_rate)
        _check_event(self.event)
        object.__setattr__(self, "sampling_rate", float(self.sampling_rate))


@dataclass(frozen=True, slots=True)
class TruncatedPoisson:
    """A Poisson sample at `sampling_rate`, of which at most `max_batch_size` records, chosen evenly, are kept.

    `num_records` is a public upper bound on the number of records of either neighbour.
    """

    sampling_rate: float
    max_batch_size: int
    num_records: int
    event: "Event"

    def __post_init__(self) -> None:
        _check_rate(self.sampling_rate)
        _check_positive(self.max_batch_size, "max_batch_size")
        _check_positive(self.num_records, "num_records")
        _check_event(self.event)
        object.__setattr__(self, "sampling_rate", float(self.sampling_rate))


@dataclass(frozen=True, slots=True)
class FixedSize:
    """`event` on exactly `batch_size` of exactly `num_records` records, all such subsets equally likely."""

    batch_size: int
    num_records: int
    event: "Event"

    def __post_init__(self) -> None:
        _check_positive(self.batch_size, "batch_size")
        _check_positive(self.num_records, "num_records")
        ok = self.batch_size <= self.num_records
        require(ok, "batch_size", f"at most num_records={self.num_records}", self.batch_size, "lower it")
        _check_event(self.event)


BY_RECORD, BY_POSITION = "by record", "by position"


@dataclass(frozen=True, slots=True)
class OncePerEpoch:
    """A whole epoch: `event` once on each of `steps` batches, each record in at most one of them.

    `assignment` says what decides the batch of a record, never its content: `BY_RECORD`, a coin of its own,
    whoever else is there (balls in bins); or `BY_POSITION`, its place in a dataset of fixed length (shuffled
    or in order). One event is charged for the epoch, before its first release.
    """

    steps: int
    assignment: str
    event: "Event"

    def __post_init__(self) -> None:
        _check_positive(self.steps, "steps")
        known = (BY_RECORD, BY_POSITION)
        require(self.assignment in known, "assignment", f"one of {known}", self.assignment, "say which")
        _check_event(self.event)


@dataclass(frozen=True, slots=True)
class HiddenFeedback:
    """One step of error feedback whose error e is kept secret and never noised (DiceSGD, arXiv:2311.14632).

    In units of the clipping threshold C1, with J a Poisson sample at `sampling_rate`:

        release sum_J clip(g_i, 1) + clip(e, feedback) + N(0, noise_multiplier^2 I);
        e <- e - clip(e, feedback) + sum_J r_i, from e = 0.

    `noise_multiplier` is noise std / C1, `feedback` is C2 / C1, `residual` bounds |r_i| / C1 (None: nothing does).
    Gradients may depend on released outputs, not on e. Steps that share an error with a bounded residual keep
    C1, C2, the residual and the noise std (the rate may change): where one of them changes, e starts from 0 again.
    Two runs have an error each.
    """

    sampling_rate: float
    noise_multiplier: float
    feedback: float
    residual: float | None

    def __post_init__(self) -> None:
        _check_rate(self.sampling_rate)
        s, c, r = self.noise_multiplier, self.feedback, self.residual
        require(
            _is_real(s) and s >= 0,
            "noise_multiplier",
            "a finite number >= 0",
            s,
            "pass noise std / threshold",
        )
        require(
            _is_real(c) and c > 0,
            "feedback",
            "a finite number > 0",
            c,
            "pass C2 / C1, or PoissonSampled for 0",
        )
        ok = r is None or (_is_real(r) and r > 0)
        require(ok, "residual", "a finite number > 0 or None", r, "pass the bound on one residual / C1")
        for name in ("sampling_rate", "noise_multiplier", "feedback"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "residual", None if r is None else float(r))


@dataclass(frozen=True, slots=True)
class Repeated:
    """`count` runs of `event` with fresh randomness."""

    event: "Event"
    count: int

    def __post_init__(self) -> None:
        n = self.count
        ok = isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST
        require(ok, "count", "an integer >= 0", n, "pass the number of runs as an int")
        _check_event(self.event)


@dataclass(frozen=True, slots=True)
class Composed:
    """All of `events`, on the same dataset. The empty composition releases nothing and costs nothing.

    `relation` says under which neighbouring relation they were charged (`accountants.relations`): an accountant of
    another one refuses them. None: of no ledger, to be priced under any. It takes no part in comparisons.
    """

    events: "tuple[Event, ...]"
    relation: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        ok = isinstance(self.events, tuple)
        require(ok, "events", "a tuple of events", self.events, "pass tuple(events)")
        ok = self.relation is None or isinstance(self.relation, str)
        require(ok, "relation", "the name of a relation or None", self.relation, "leave it out")
        for i, event in enumerate(self.events):
            require(is_event(event), f"events[{i}]", "an event", event, "wrap it in NonPrivate() if unknown")


@dataclass(frozen=True, slots=True)
class NonPrivate:
    """A release without any privacy guarantee: epsilon is infinite for every delta below one."""


Leaf = Gaussian | PoissonSampled | TruncatedPoisson | FixedSize | OncePerEpoch | HiddenFeedback | NonPrivate
Event = Leaf | Repeated | Composed

KINDS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        Gaussian, PoissonSampled, TruncatedPoisson, FixedSize, OncePerEpoch, HiddenFeedback, Repeated, Composed,
        NonPrivate
    )
}  # fmt: skip
