# SPDX-License-Identifier: Apache-2.0
"""The private records of the embedded task: docstrings of the scientific packages that dpopt depends on.

The unit of privacy is one record, and one record is one docstring: neighbouring data sets differ by the presence
of one docstring. Law: the records are near duplicates neither of each other nor of the public text, and training
and validation share no module; they depend on the installed source files and on the seed, and on nothing else.

What a privacy guarantee covers is the list of records returned here. Dropping near duplicates and cutting the list
are done before, on all docstrings, and a docstring that was dropped could have stood in for another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import chain

from dpopt.embedded.docstrings import (
    Docstring,
    Fingerprints,
    collection_paused,
    digest,
    docstrings_of,
    package_folder,
    share,
    without_duplicates,
)
from dpopt.embedded.public import public_fingerprints

PRIVATE_PACKAGES = ("numpy", "scipy", "torch", "sympy", "networkx")
VALIDATION_SHARE = 0.06
UNIT_OF_PRIVACY = "one docstring of one function, method or class"

_SKIPPED = frozenset({"tests", "test", "testing", "_vendor", "_inductor", "_dynamo", "distutils"})


@dataclass(frozen=True, slots=True)
class Records:
    """Private texts for training and for validation, with the (package, version) pairs they were read from."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]
    unit: str = UNIT_OF_PRIVACY


def private_records(
    *,
    seed: int = 0,
    max_train: int = 16_000,
    max_validation: int = 500,
    packages: Sequence[str] = PRIVATE_PACKAGES,
    fingerprints: Fingerprints | None = None,
) -> Records:
    """Read the private records of the installed packages, split by module: about 10 seconds, most of it parsing.

    Args:
        seed: decides which modules are for validation, and the order of the records.
        max_train: the most records for training; the rest are left out.
        max_validation: the most records for validation; the rest are left out.
        packages: the installed packages whose docstrings are read, in the order in which near duplicates are dropped.
        fingerprints: of the public text; those of the shipped model when not given.

    Guarantees: `train` and `validation` are disjoint, by text and by module, and hold nothing that resembles the
    text that the shipped model was trained on.
    """
    split: dict[bool, list[tuple[bytes, str]]] = {False: [], True: []}
    for docstring in private_docstrings(packages, fingerprints=fingerprints):
        key = digest(f"{seed}:{docstring.module}:{docstring.record}")
        split[is_validation(docstring.module, seed=seed)].append((key, docstring.record))
    return Records(
        train=tuple(record for _, record in sorted(split[False])[:max_train]),
        validation=tuple(record for _, record in sorted(split[True])[:max_validation]),
        sources=tuple((package, metadata.version(package)) for package in packages),
    )


def private_docstrings(
    packages: Sequence[str] = PRIVATE_PACKAGES, *, fingerprints: Fingerprints | None = None
) -> tuple[Docstring, ...]:
    """Read the docstrings of the packages, without those that resemble each other or the public text."""
    found = (docstrings_of(package_folder(package), root=package, skip=_SKIPPED) for package in packages)
    seen = public_fingerprints() if fingerprints is None else fingerprints.copy()
    with collection_paused():
        return tuple(without_duplicates(chain.from_iterable(found), seen))


def is_validation(module: str, *, seed: int) -> bool:
    """Whether the records of a module are for validation."""
    return share(f"{seed}:{module}") < VALIDATION_SHARE
