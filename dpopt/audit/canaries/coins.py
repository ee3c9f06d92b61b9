# SPDX-License-Identifier: Apache-2.0
"""The coins of canaries: tossed when a run begins, known by a hash on its ledger, and written when it has ended.

| file beside the ledger | who may read it | holds |
|---|---|---|
| `audit-coins.json` | its owner (mode 0600) | which canaries took part, once the run has ended |
| `audit-scores.json` | everybody who sees the model | what the releases say of each canary |

Beside a ledger that is not called `privacy.ledger.jsonl`, both names begin with that of the ledger. A file holds every
run of its ledger, the last one last.

The law of this file: while a run is open its coins are on no disk, so a run that is killed opens none; a file is written
whole or not at all, and nothing of another run is lost.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from accountants import read
from dpopt.atomic_files import written_file
from dpopt.audit.evidence import BoolArray, Evidence
from dpopt.randomness.keys import RandomKey, fair_coins, subkey

COINS, SCORES = "audit-coins.json", "audit-scores.json"
_USUAL = "privacy.ledger.jsonl"
_VERSION = 1


@dataclass(frozen=True, slots=True, repr=False)
class Coins:
    """What was tossed, (m,) booleans, and the salt that hides it in the hash until it is opened."""

    included: BoolArray
    salt: bytes

    @property
    def commitment(self) -> str:
        """The hash that is on the ledger from the beginning."""
        return _commitment(self.included, self.salt)

    def __repr__(self) -> str:
        return f"Coins({len(self.included)} <hidden>)"


def tossed(key: RandomKey, num: int) -> Coins:
    """One fair coin for each of `num` canaries, from the run's secret randomness."""
    return Coins(fair_coins(key, num, "canaries"), subkey(key, "canaries", "salt"))


def files(ledger: Path) -> tuple[Path, Path]:
    """Where coins and scores of the runs on `ledger` lie."""
    before = "" if ledger.name == _USUAL else f"{ledger.stem}."
    return ledger.with_name(before + COINS), ledger.with_name(before + SCORES)


def sealed(ledger: Path, coins: Coins) -> None:
    """Note beside `ledger` that a run with these coins has begun; none of them is written."""
    _put(files(ledger)[0], {"run": coins.commitment, "sealed": True})


def opened(ledger: Path, coins: Coins, evidence: Sequence[Evidence], about: Mapping[str, object]) -> None:
    """Write coins and scores of a run that has ended; the scores first.

    Raises:
        OSError: they could not be written; the files are as they were.
    """
    run = coins.commitment
    told = [json.loads(one.to_json()) for one in evidence]
    took_part = [one.pop("included") for one in told]
    coins_at, scores_at = files(ledger)
    _put(scores_at, {"run": run, "about": dict(about), "evidence": told})
    drawn = {"run": run, "sealed": False, "salt": coins.salt.hex(), "included": took_part}
    _put(coins_at, drawn | {"coins": coins.included.astype(int).tolist()})


def read_evidence(ledger: Path) -> tuple[Evidence, ...]:
    """The evidence of the last audited run on `ledger`, the most direct first.

    Raises:
        FileNotFoundError: no run on it was audited.
        ValueError: that run has not ended, or coins, scores and ledger are not of each other.
    """
    coins_at, scores_at = files(ledger)
    if not coins_at.is_file():
        raise FileNotFoundError(
            f"expected the coins of an audited run at {coins_at}; got none; train with audit=Canaries(1000), or "
            "dpopt finetune --audit canaries=1000"
        )
    runs = _runs(coins_at)
    last: dict[str, Any] = runs[-1] if runs else {"sealed": True}
    if last.get("sealed", True):
        raise ValueError(
            f"expected a run that has ended beside {ledger}; got one that still trains, or was killed, whose coins nobody "
            "knows any more; wait for it, or train to the end of a run"
        )
    scores = [one for one in _runs(scores_at) if one.get("run") == last["run"]]
    if len(scores) != 1 or len(scores[0]["evidence"]) != len(last["included"]):
        raise ValueError(
            f"expected the scores of the run {last['run'][:12]} in {scores_at}; got none that fit; put the file back, "
            "or train anew"
        )
    pairs = zip(scores[0]["evidence"], last["included"], strict=True)
    found = tuple(Evidence.from_json(json.dumps(told | {"included": took_part})) for told, took_part in pairs)
    _require_committed(ledger, last, [one.included for one in found if not one.per_step])
    return found


def about(ledger: Path) -> Mapping[str, Any]:
    """What the last audited run on `ledger` measured of its canaries' cost."""
    return _runs(files(ledger)[1])[-1]["about"]


def _require_committed(ledger: Path, run: Mapping[str, Any], told: Sequence[BoolArray]) -> None:
    included = np.array(run["coins"], dtype=bool)
    attempts: list[Any] = [
        record.payload["config"] for record in read(ledger).records if record.kind == "attempt"
    ]
    named = [attempt["audit"]["commitment"] for attempt in attempts if "audit" in attempt]
    fits = _commitment(included, bytes.fromhex(run["salt"])) == run["run"] and run["run"] in named
    if not fits or not all(np.array_equal(one, included) for one in told):
        raise ValueError(
            f"expected the coins whose hash is on the ledger {ledger}; got others: they were changed after the run, or are "
            "of another ledger; put the files of this run back"
        )


def _commitment(included: BoolArray, salt: bytes) -> str:
    return hashlib.sha256(salt + np.packbits(included).tobytes() + b"%d" % len(included)).hexdigest()


def _runs(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        told = json.loads(path.read_bytes())
        return list(told["runs"]) if told["version"] == _VERSION else _unknown(path, told["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected what an audited run wrote in {path}; got something else ({error}); move it away"
        ) from error


def _unknown(path: Path, version: object) -> list[dict[str, Any]]:
    raise ValueError(f"version {version}, of a newer dpopt")


def _put(path: Path, entry: dict[str, Any]) -> None:
    """Write the file at `path` anew, with `entry` last and in place of the one of the same run."""
    runs = [run for run in _runs(path) if run["run"] != entry["run"]]
    data = json.dumps({"version": _VERSION, "runs": [*runs, entry]}, allow_nan=False).encode()

    def write(file: IO[bytes]) -> None:
        os.fchmod(file.fileno(), 0o600)  # before the first byte: nobody else has it open
        file.write(data)

    path.parent.mkdir(parents=True, exist_ok=True)
    written_file(path, write)
