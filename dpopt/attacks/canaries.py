# SPDX-License-Identifier: Apache-2.0
"""Canaries with a random secret, to be put among training records: "the code is 4 8 2 1".

The law of this file: a secret is drawn uniformly from a space that is fixed before, and each of its symbols is one
token whatever stands beside it, so that every other secret of the space is a text that could have stood there.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from dpopt.atomic_files import write_file
from dpopt.finetune.record_files import InputError

DIGITS = tuple("0123456789")


@dataclass(frozen=True, slots=True)
class SecretFormat:
    """A text that ends in a secret, and the space from which the secret comes.

    Args:
        prefix: the text before the secret.
        length: symbols of a secret.
        alphabet: what each symbol is drawn from.
        separator: stands before each symbol; a blank keeps many tokenizers from joining symbols.
    """

    prefix: str
    length: int = 4
    alphabet: tuple[str, ...] = DIGITS
    separator: str = " "

    def __post_init__(self) -> None:
        if self.length < 1 or len(set(self.alphabet)) != len(self.alphabet) or len(self.alphabet) < 2:
            raise InputError(
                f"expected at least one symbol of an alphabet of two or more different ones; got {self.length} of "
                f"{self.alphabet}; take 4 of the digits"
            )

    @property
    def size(self) -> int:
        """How many secrets there are."""
        return len(self.alphabet) ** self.length

    def text(self, secret: Sequence[str]) -> str:
        """The whole text with a secret."""
        return self.prefix + "".join(self.separator + symbol for symbol in secret)


class Place(NamedTuple):
    """One symbol of a secret as tokens: what stands before every symbol, and one token for each of the alphabet."""

    before: list[int]
    symbols: list[int]


@dataclass(frozen=True, slots=True)
class SecretCanary:
    """One secret, and in how many training records it was put (0: a control)."""

    format: SecretFormat
    secret: tuple[str, ...]
    times: int

    @property
    def text(self) -> str:
        """The text that was put among the training records."""
        return self.format.text(self.secret)


def draw_secrets(
    formats: Sequence[SecretFormat], times: Sequence[int], *, seed: int | None = None
) -> list[SecretCanary]:
    """One canary for each pair of a format and a number of copies, no secret of a format twice.

    Args:
        formats: the texts.
        times: in how many records each secret is to be put; 0 for a control.
        seed: None draws from the operating system's entropy; a number repeats.
    """
    source = random.SystemRandom() if seed is None else random.Random(seed)
    drawn = []
    for form in formats:
        if form.size < len(times):
            raise InputError(
                f"expected a space of at least {len(times)} secrets; got {form.size}; take longer secrets"
            )
        seen: set[tuple[str, ...]] = set()
        for count in times:
            secret = tuple(source.choices(form.alphabet, k=form.length))
            while secret in seen:
                secret = tuple(source.choices(form.alphabet, k=form.length))
            seen.add(secret)
            drawn.append(SecretCanary(form, secret, count))
    return drawn


def write_secrets(path: Path, canaries: Sequence[SecretCanary]) -> None:
    """Write canaries to a file of one JSON object a line, readable by its owner alone."""
    lines = "".join(json.dumps(asdict(canary)) + "\n" for canary in canaries)
    write_file(path, lines.encode())
    path.chmod(0o600)


def write_records(path: Path, canaries: Sequence[SecretCanary]) -> int:
    """Write the records to be trained on, each secret as often as it is to be put, and return how many there are."""
    rows = [json.dumps({"text": canary.text}) + "\n" for canary in canaries for _ in range(canary.times)]
    write_file(path, "".join(rows).encode())
    path.chmod(0o600)
    return len(rows)


def read_secrets(path: Path) -> list[SecretCanary]:
    """Read what `write_secrets` wrote.

    Raises:
        InputError: the file is missing or holds something else.
    """
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        found = [
            SecretCanary(
                SecretFormat(**(row["format"] | {"alphabet": tuple(row["format"]["alphabet"])})),
                tuple(row["secret"]),
                int(row["times"]),
            )
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"expected canaries as 'dpopt audit secrets' writes them; got {path} ({type(error).__name__}); write them "
            "again"
        ) from error
    if not found:
        raise InputError(f"expected at least one canary in {path}; got none; write them again")
    return found


def symbol_tokens(form: SecretFormat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Place]]:
    """The token ids of the prefix, and for each place of the secret those that may stand there.

    Raises:
        InputError: the tokenizer joins or splits symbols, so that a secret is no sequence of one token for each.
    """
    rows = {symbol: _ids(tokenizer, form.text([symbol] * form.length)) for symbol in form.alphabet}
    empty = _ids(tokenizer, form.prefix)
    per_symbol, odd = divmod(len(rows[form.alphabet[0]]) - len(empty), form.length)
    if not odd and per_symbol > 0 and empty:
        places = [
            Place(
                rows[form.alphabet[0]][start : start + per_symbol - 1],
                [row[start + per_symbol - 1] for row in rows.values() if len(row) >= start + per_symbol],
            )
            for start in range(len(empty), len(empty) + form.length * per_symbol, per_symbol)
        ]
        probes = [*([symbol] * form.length for symbol in form.alphabet), *_probes(form)]
        whole = all(len(set(place.symbols)) == len(form.alphabet) for place in places)
        if whole and all(
            _ids(tokenizer, form.text(probe)) == [*empty, *_spelt(form, probe, places)] for probe in probes
        ):
            return empty, places
    raise InputError(
        f"expected a tokenizer for which each symbol is one token; got one that joins or splits some of "
        f"{form.text(form.alphabet[: form.length])!r}; choose another separator or alphabet"
    )


def secret_ids(canary: SecretCanary, places: Sequence[Place]) -> list[int]:
    """The tokens of a canary's secret, with what stands between its symbols."""
    return _spelt(canary.format, canary.secret, places)


def _spelt(form: SecretFormat, secret: Sequence[str], places: Sequence[Place]) -> list[int]:
    number = {symbol: i for i, symbol in enumerate(form.alphabet)}
    return [
        token
        for place, symbol in zip(places, secret, strict=True)
        for token in (*place.before, place.symbols[number[symbol]])
    ]


def _probes(form: SecretFormat) -> list[tuple[str, ...]]:
    """Every pair of neighbours somewhere: as many secrets as there are pairs, at most 400, and in a fixed order."""
    pairs = itertools.islice(itertools.product(form.alphabet, repeat=2), 400)
    return [tuple((first, second)[i % 2] for i in range(form.length)) for first, second in pairs]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = cast("Any", tokenizer)(text, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def bits(form: SecretFormat) -> float:
    """The most that exposure can be: log2 of the size of the space."""
    return math.log2(form.size)
