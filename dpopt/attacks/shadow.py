# SPDX-License-Identifier: Apache-2.0
"""Shadow models: the same training on random halves of a pool of records, with the coins written down.

The law of this file: a model that has its name is whole, and was trained on the half that the coins of the plan say;
whoever kills the training and starts it again gets the models that were missing, and no others.

The models come in pairs of opposite halves: every record trained exactly half of an even number of them. They were
trained on the records without privacy, or without a charge: the folder is for its owner alone, and no part of a release.

Shapes: S shadow models, n records of the pool.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dpopt.atomic_files import whole_folder, write_file
from dpopt.attacks.scores import BoolArray
from dpopt.finetune.record_files import InputError, TextRecord

Model = TypeVar("Model")
PLAN = "shadow-plan.json"


@dataclass(frozen=True, slots=True)
class ShadowPlan:
    """What fixes every shadow model: the pool, the coins and the training.

    Args:
        records: a digest of each record of the pool, in its order.
        seed: of the coins, and with a model's number of its training.
        settings: how the models are trained; a folder holds models of one kind.
    """

    records: tuple[str, ...]
    seed: int
    settings: Mapping[str, object]

    def included(self, num_models: int) -> BoolArray:
        """(S, n): whether record i trains model s, by fair coins; model 2j + 1 has the records that 2j has not."""
        rows = []
        for number in range(num_models):
            half = np.random.default_rng([self.seed, number // 2]).random(len(self.records)) < 0.5
            rows.append(half if number % 2 == 0 else ~half)
        return np.array(rows, dtype=bool).reshape(num_models, len(self.records))


def record_digest(record: TextRecord) -> str:
    """By which a record is found in the pool, wherever it stands there."""
    return hashlib.sha256(f"{len(record.prompt)}:{record.prompt}{record.text}".encode()).hexdigest()[:24]


def train_shadows(
    folder: Path,
    plan: ShadowPlan,
    num_models: int,
    train: Callable[[NDArray[np.int64], int], Model],
    save: Callable[[Model, Path], object],
    *,
    trained: Callable[[int], object] | None = None,
) -> None:
    """Train the shadow models that `folder` does not hold yet.

    Args:
        folder: made if missing, with the plan and a folder for each model.
        plan: the pool and the coins; that of the folder, where it has one.
        num_models: S; even, so that every record is in half of them. A larger number later adds models.
        train: (places in the pool, seed) -> a model trained on those records.
        save: writes a model into a folder, which takes its name when all of it is on the disk.
        trained: told the number of each model that is there.

    Raises:
        InputError: the folder holds models of another plan, the number is odd, or another process trains here.
        OSError: a model could not be written; those before it stand.
    """
    if num_models < 2 or num_models % 2:
        raise InputError(
            f"expected an even number of shadow models; got {num_models}; they come in pairs of opposite halves"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(folder):
        _settle(folder, plan)
        for left in folder.glob(".model-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        included = plan.included(num_models)
        for number in range(num_models):
            if not model_path(folder, number).is_dir():
                model = train(np.flatnonzero(included[number]), plan.seed * 100_003 + number)
                with whole_folder(model_path(folder, number)) as partial:
                    save(model, partial)
            if trained is not None:
                trained(number)


def model_path(folder: Path, number: int) -> Path:
    """Where shadow model `number` stands."""
    return folder / f"model-{number:04d}"


def read_plan(folder: Path) -> ShadowPlan:
    """The plan of a folder of shadow models.

    Raises:
        InputError: the folder has none, or none that can be read.
    """
    try:
        data = json.loads((folder / PLAN).read_text())
        return ShadowPlan(tuple(data["records"]), int(data["seed"]), data["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"expected a folder with a {PLAN} as 'dpopt audit shadow' writes it; got {folder} "
            f"({type(error).__name__}); train shadow models first"
        ) from error


def finished(folder: Path) -> list[Path]:
    """The models of a folder that are whole, in order; a last one without its opposite is left out."""
    numbers = 0
    while model_path(folder, numbers).is_dir():
        numbers += 1
    return [model_path(folder, number) for number in range(numbers - numbers % 2)]


def places_of(plan: ShadowPlan, digests: Sequence[str]) -> NDArray[np.int64]:
    """Where in the pool the records with these digests stand.

    Raises:
        InputError: some do not: no coin says which shadow models saw them.
    """
    known = {digest: place for place, digest in enumerate(plan.records)}
    missing = sum(digest not in known for digest in digests)
    if missing:
        raise InputError(
            f"expected records of the pool of the shadow models; got {missing} of {len(digests)} that are not in it; "
            "train shadow models on a pool of members and non-members together"
        )
    return np.array([known[digest] for digest in digests], dtype=np.int64)


def _settle(folder: Path, plan: ShadowPlan) -> None:
    if len(set(plan.records)) != len(plan.records):
        twice = len(plan.records) - len(set(plan.records))
        raise InputError(
            f"expected each record once in the pool; got {twice} again; remove repeated records, whose coins would "
            "contradict one another"
        )
    if (folder / PLAN).exists():
        held, settings = read_plan(folder), json.loads(json.dumps(dict(plan.settings)))
        pairs = {
            "records": (held.records, plan.records),
            "seed": (held.seed, plan.seed),
            "settings": (held.settings, settings),
        }
        differing = [name for name, (old, new) in pairs.items() if old != new]
        if differing:
            raise InputError(
                f"expected the plan that {folder} was begun with; got other {' and '.join(differing)}; take the same "
                "files and options, or another folder"
            )
        return
    text = json.dumps({"records": plan.records, "seed": plan.seed, "settings": dict(plan.settings)}, indent=1)
    write_file(folder / PLAN, text.encode())
    (folder / PLAN).chmod(0o600)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"expected to be alone in {folder}; got another process that trains there; wait for it"
            ) from error
        yield
