# SPDX-License-Identifier: Apache-2.0
"""Users as the unit of privacy: all records of a person come and go together, and count as one contribution."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from accountants import Event
from dpopt.sampling.poisson import PoissonSampling
from dpopt.sampling.sampler import Records, Sampling


@dataclass(frozen=True, slots=True)
class UserSampling:
    """Each user takes part in each step independently with probability `sampling_rate`, with all their records.

    It draws users out of a `Users` view of the dataset; `expected_batch_size` counts users. What the step must do: one
    contribution per user, of norm at most the clip norm. So either a user is one example (their records joined
    into one sequence, or one record each, `max_records=1`), and one loss per user is enough; or the gradients of a
    user's records are added *before* the norm is taken. Clipping each record and charging one contribution
    would be wrong by a factor of `max_records`; for that, charge a group (`accountants.group`).

    Guarantees
    ----------
    The event is `PoissonSampled(sampling_rate, ...)` with the user as unit: neighbours differ by all records of one
    user, who is drawn independently of the others (McMahan et al. 2018, arXiv:1710.06963)
    (test_guarantee_users_come_whole_and_within_the_cap).
    """

    sampling_rate: float
    expected_batch_size: float

    def __post_init__(self) -> None:
        PoissonSampling(self.sampling_rate, self.expected_batch_size)

    @property
    def steps_per_charge(self) -> int:
        """One: each step is a draw of its own."""
        return 1

    def event(self, mechanism: Event) -> Event:
        """The event of one step that runs `mechanism` on one contribution per drawn user."""
        return PoissonSampling(self.sampling_rate, self.expected_batch_size).event(mechanism)

    def draw(self, num_records: int, generator: torch.Generator, step: int = 0) -> list[int]:
        """Numbers of the users of one step, in increasing order; `num_records` is the number of users."""
        poisson = PoissonSampling(self.sampling_rate, self.expected_batch_size)
        return poisson.draw(num_records, generator, step)


@dataclass(frozen=True, slots=True, eq=False)
class Users:
    """A dataset whose items are users: item i holds the records of user i, the first `max_records` of them.

    Guarantees
    ----------
    An item depends on the records of its own user only, and holds at most the public `max_records`
    (test_guarantee_users_come_whole_and_within_the_cap).
    """

    records: Records[object]
    places: tuple[tuple[int, ...], ...]
    max_records: int

    @classmethod
    def of(cls, records: Records[object], owners: Sequence[Hashable], *, max_records: int) -> Users:
        """Group `records` by `owners`, the user of each; users keep the order of their first record.

        Raises:
            ValueError: not one owner for each record, or a cap below 1. A cap read off the data would tell about it.
        """
        if len(owners) != len(records):
            raise ValueError(
                f"expected one owner for each record; got {len(owners)} owners; pass the user of every record"
            )
        if max_records < 1:
            raise ValueError(f"expected max_records >= 1; got {max_records}; choose a public cap")
        places: dict[Hashable, list[int]] = {}
        for index, owner in enumerate(owners):
            held = places.setdefault(owner, [])
            if len(held) < max_records:
                held.append(index)
        return cls(records, tuple(tuple(held) for held in places.values()), max_records)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int, /) -> tuple[object, ...]:
        return tuple(self.records[place] for place in self.places[index])


def unit_of(sampling: Sampling) -> str:
    """The unit of privacy that a sampler draws, as a ledger calls it."""
    return "user" if isinstance(sampling, UserSampling) else "one record of the dataset"


def require_users(sampling: Sampling, dataset: object) -> None:
    """Raise ValueError where users are drawn from something else than a view of users."""
    if isinstance(sampling, UserSampling) and not isinstance(dataset, Users):
        raise ValueError(
            f"expected a Users view of the dataset where users are drawn; got {type(dataset).__name__}, whose items "
            "may be several of one user; pass Users.of(records, owners, max_records=...)"
        )
