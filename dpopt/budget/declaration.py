# SPDX-License-Identifier: Apache-2.0
"""What a run declares on its ledger before its first charge, and whether a later run declares the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from accountants import Event, to_dict
from accountants.registry import DEFAULT as DEFAULT_ACCOUNTANT
from clipping import Clipper, GroupClipper
from dpopt.budget.budget import Budget
from dpopt.budget.filtered import AdaptiveBudget
from dpopt.mechanisms import Mechanism
from dpopt.sampling.sampler import Sampling

COMPARED = (
    "event", "sampler", "expected_batch_size", "mechanism", "allocation", "estimator", "clipper", "rules", "groups",
    "clip_norms", "sensitivity", "accountant", "randomness",
)  # fmt: skip
"""What a run shares with the one that it continues. A budget may be raised; unit and relation are the ledger's own."""


def configuration(
    *,
    event: Event,
    sampling: Sampling,
    mechanism: Mechanism,
    clipper: Clipper,
    estimator: Mapping[str, object],
    accountant: str,
    randomness: str,
    assumptions: Sequence[str],
    budget: Budget | AdaptiveBudget | None,
    insecure_seed: int | None,
) -> dict[str, object]:
    """The public configuration of a run, as its ledger keeps it."""
    rules = clipper.clippers if isinstance(clipper, GroupClipper) else (clipper,)
    return {
        "event": to_dict(event),
        "sampler": type(sampling).__name__,
        "expected_batch_size": sampling.expected_batch_size,
        "mechanism": type(mechanism).__name__,
        "allocation": _name(getattr(mechanism, "allocation", None)),
        "estimator": dict(estimator),
        "clipper": type(clipper).__name__,
        "rules": sorted({type(rule).__name__ for rule in rules}),
        "groups": len(clipper.clip_norms),
        "clip_norms": sorted(set(clipper.clip_norms)),
        "sensitivity": clipper.sensitivity,
        "accountant": accountant,
        "randomness": randomness,
        "assumptions": list(assumptions),
        "budget": None if budget is None else [budget.epsilon, budget.delta],
        "insecure_seed": insecure_seed,
        "torch": torch.__version__,
    }


def refuse_changed(
    attempts: Sequence[Mapping[str, object]], config: Mapping[str, object], where: object
) -> None:
    """Raise ValueError where the last run on a ledger declared another configuration than `config`."""
    declared = [attempt for attempt in attempts if "sampler" in attempt]
    if not declared:
        return
    before, now = declared[-1], json.loads(json.dumps(config))
    changed = [key for key in COMPARED if before.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"expected the configuration of the last run on {where}, { ({key: before.get(key) for key in changed}) }; "
            f"got { ({key: now[key] for key in changed}) }; continue as before, or say new_configuration=True: both "
            "runs are charged as what they are, but a configuration chosen after looking at what was released "
            "before is beyond every bound except a filter's"
        )


def accountant_of(ledger: object) -> str:
    """The accountant that the last run on the ledger at path `ledger` declared, which a run that names none keeps.

    Else the usual one. It is looked for before the file is verified; what a run declares is compared again after that.
    """
    path = Path(ledger) if isinstance(ledger, str | Path) else None
    name = DEFAULT_ACCOUNTANT
    if path is None or not path.is_file():
        return name
    with path.open("rb") as lines:
        for line in lines:
            if b'"attempt"' in line:
                name = _declared_accountant(line) or name
    return name


def _declared_accountant(line: bytes) -> str | None:
    try:
        record = json.loads(line)
        config = record["payload"]["config"] if record["kind"] == "attempt" else {}
        name = config.get("accountant")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # verifying the file says what is wrong with it
    return name if isinstance(name, str) else None


def declared_assumptions(attempts: Sequence[Mapping[str, object]]) -> tuple[str, ...]:
    """What the randomness of all runs on a ledger stands on, each assumption once, in order."""
    said = (text for attempt in attempts for text in _texts(attempt.get("assumptions")))
    return (*dict.fromkeys(said),)


def _texts(value: object) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _name(function: object) -> str | None:
    if function is None:
        return None
    return (
        f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
    )
