# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a private run: weights, optimizer and public state, beside the name of the ledger that paid for them.

A checkpoint never holds what was spent, it only says on which ledger that stands: `id`, and the `head` at that moment.
Loading an old one goes back in the weights and forward in nothing else: what was charged since stays charged. A ledger that
is another one, or is older than the checkpoint, is refused.

The file is torch's own, written whole or not at all, and read with `weights_only=True`: it cannot run code.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from torch import nn
from torch.optim import Optimizer

from accountants import Ledger
from dpopt.atomic_files import written_file
from dpopt.compatibility.opacus_weights import charge_history, for_module
from dpopt.compatibility.schedulers import Scheduler
from dpopt.estimators.centred import Centred
from dpopt.estimators.clip_norm_tracking import Level
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.quantile import Quantile
from dpopt.estimators.schedule import Scheduled
from dpopt.estimators.slack import Slack
from dpopt.estimators.two_threshold import TwoThreshold
from dpopt.training import PrivateTraining

OURS = "dpopt"
Place = str | os.PathLike[str] | IO[bytes]

_RESERVED = (OURS, "module_state_dict", "optimizer_state_dict", "privacy_accountant_state_dict",
             "noise_scheduler_state_dict", "grad_clip_scheduler_state_dict")  # fmt: skip


class Stateful(Protocol):
    """What tells its state as numbers and texts."""

    def state_dict(self) -> dict[str, object]:
        """The state."""
        ...


def save(
    training: PrivateTraining,
    place: Place,
    *,
    module: nn.Module,
    optimizer: Optimizer | None,
    accountant: Stateful,
    schedulers: Mapping[str, Scheduler | None],
    extra: Mapping[str, object] | None,
    module_options: Mapping[str, Any] | None,
    torch_options: Mapping[str, Any] | None,
) -> None:
    """Write a checkpoint of a run: see `PrivacyEngine.save_checkpoint`."""
    check_extra(extra)
    _refuse_options("torch_save_kwargs", torch_options, ())
    content: dict[str, object] = {
        **(extra or {}),
        "module_state_dict": module.state_dict(**(module_options or {})),
        "privacy_accountant_state_dict": accountant.state_dict(),
        OURS: described(training),
    }
    if optimizer is not None:
        content["optimizer_state_dict"] = optimizer.state_dict()
    for name, scheduler in schedulers.items():
        if scheduler is not None:
            content[f"{name}_state_dict"] = scheduler.state_dict()
    write(place, content)


def load(
    training: PrivateTraining,
    place: Place,
    *,
    module: nn.Module,
    optimizer: Optimizer | None,
    schedulers: Mapping[str, Scheduler | None],
    module_options: Mapping[str, Any] | None,
    torch_options: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Go back to a checkpoint: see `PrivacyEngine.load_checkpoint`."""
    _refuse_options("torch_load_kwargs", torch_options, ("map_location", "weights_only"))
    found = read(place)
    if OURS in found:
        require_ledger(training.ledger, training.ledger_path, found[OURS])
        restore(training, found[OURS])
        training.ledger.note("a checkpoint was loaded", context={"charges": found[OURS]["ledger"]["charges"]})
    else:
        charge_history(training, found)
    state = found["module_state_dict"]
    module.load_state_dict(for_module(module, state), **(module_options or {}))
    training.note_buffers()
    _load_optimizer(optimizer, found.get("optimizer_state_dict"))
    for name, scheduler in schedulers.items():
        if scheduler is not None and f"{name}_state_dict" in found:
            scheduler.load_state_dict(found[f"{name}_state_dict"])
    return found


def _load_optimizer(optimizer: Optimizer | None, state: Mapping[str, Any] | None) -> None:
    if optimizer is not None and state:
        optimizer.load_state_dict(dict(state))
    elif (optimizer is None) != (not state):
        held = "none" if not state else "one"
        warnings.warn(
            f"the checkpoint holds {held} of the optimizer's state, and load_checkpoint was given "
            f"{'no' if optimizer is None else 'an'} optimizer: the optimizer begins anew",
            stacklevel=4,
        )


def described(training: PrivateTraining) -> dict[str, object]:
    """What a checkpoint says of a run: its ledger, how many rounds were charged, and the estimator's public state.

    Leaves a note on the ledger first, so that it is never older than the checkpoint.
    """
    charged = training.payments.rounds.charged
    ledger = training.ledger
    ledger.note("a checkpoint was written", context={"charges": ledger.num_charges})
    name = training.ledger_path.name
    return {
        "ledger": {"id": ledger.id, "head": ledger.head, "charges": ledger.num_charges, "name": name},
        "rounds": getattr(training.estimator, "start", 0) + charged,
        "estimator": {"name": training.estimator.setting["name"], **_public_state(training.estimator)},
    }


def restore(training: PrivateTraining, found: Mapping[str, Any]) -> None:
    """Give the estimator of a run that has not begun the public state that `described` wrote; hidden state begins anew."""
    state = dict(found.get("estimator", {}))
    name = state.pop("name", None)
    if name != training.estimator.setting["name"]:
        raise ValueError(
            f"expected the checkpoint of a run with the estimator {training.estimator.setting['name']!r}; got one with "
            f"{name!r}; pass the same clipping= to make_private, or load the weights alone: "
            'module.load_state_dict(torch.load(path)["module_state_dict"])'
        )
    estimator = training.estimator
    if isinstance(estimator, Scheduled):
        training.go_on(estimator.starting(int(found.get("rounds", 0))))
    elif isinstance(estimator, Quantile | Slack) and state:
        level = Level(float(state["clip_norm"]), tuple(map(float, state["fractions"])))
        estimator.level.clip_norm, estimator.level.fractions = level.clip_norm, level.fractions
    elif isinstance(estimator, Centred | TwoThreshold) and state:
        held = estimator.centre if isinstance(estimator, Centred) else estimator.average
        parameters = training.sum.parameters
        held.clear()
        held.update({n: v.to(parameters[n].device) for n, v in state["vectors"].items() if n in parameters})


def require_ledger(ledger: Ledger, where: Path, found: Mapping[str, Any]) -> None:
    """Refuse a ledger on which the checkpoint's releases were not paid for.

    Raises:
        ValueError: it is another ledger than the checkpoint's, or an older state of it.

    Guarantees
    ----------
    Loading gives no charge back: the ledger stays as it is, and one that lacks charges which the checkpoint's weights
    were made with is refused (test_guarantee_loading_gives_no_charge_back).
    """
    paid = found["ledger"]
    anyway = (
        "for records of another kind, paid for on another ledger, load the weights alone: "
        'module.load_state_dict(torch.load(path)["module_state_dict"])'
    )
    if ledger.id != paid["id"]:
        raise ValueError(
            f"expected the ledger that paid for this checkpoint, {paid['name']} (id {paid['id'][:8]}, {paid['charges']} "
            f"charges); got {where} (id {ledger.id[:8]}, {ledger.num_charges} charges), which knows nothing of them; make "
            f'the engine on it, PrivacyEngine(ledger=".../{paid["name"]}"), restored from a backup if it was deleted; '
            f"{anyway}"
        )
    if not ledger.knows(paid["head"]):
        raise ValueError(
            f"expected a ledger with everything that paid for this checkpoint, {paid['charges']} charges; got an older state "
            f"or another branch of it in {where}, with {ledger.num_charges}; put the newest copy of {paid['name']} back, "
            "or load an older checkpoint"
        )


def write(place: Place, content: Mapping[str, object]) -> None:
    """Write a checkpoint, or leave what was there.

    Raises:
        ValueError: `content` holds something that could only be read by running code.
        OSError: it could not be written.
    """

    def put(file: IO[bytes]) -> None:
        torch.save(dict(content), file)
        file.seek(0)
        try:
            torch.load(file, weights_only=True, map_location="meta")
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"expected tensors, numbers, texts, lists and dicts in a checkpoint; got something else ({_first(error)}), "
                "which could only be read by running code; leave it out of checkpoint_dict, or store it by itself"
            ) from error

    if isinstance(place, str | os.PathLike):
        written_file(Path(place), put)
        return
    buffer = io.BytesIO()
    put(buffer)
    place.write(buffer.getvalue())


def read(place: Place) -> dict[str, Any]:
    """Read a checkpoint, ours or one that Opacus wrote, without running code.

    Raises:
        ValueError: it is none, or holds something that could only be read by running code.
    """
    try:
        found = torch.load(cast("Any", place), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"expected a checkpoint of tensors, numbers and texts; got {_shown(place)}, which could only be read by "
            f"running code ({_first(error)}); load what you trust yourself, and save it with save_checkpoint"
        ) from error
    if not isinstance(found, dict) or "module_state_dict" not in found:
        raise ValueError(
            f"expected a file that save_checkpoint wrote; got {_shown(place)} without module_state_dict; load a plain "
            "state_dict with module.load_state_dict(torch.load(path))"
        )
    return found


def check_extra(extra: Mapping[str, object] | None) -> None:
    """Refuse keys of the user's that the checkpoint has itself."""
    taken = sorted(set(extra or {}) & set(_RESERVED))
    if taken:
        raise ValueError(
            f"expected checkpoint_dict without the checkpoint's own keys; got {taken}; rename them"
        )


def _public_state(estimator: Estimator) -> dict[str, object]:
    if isinstance(estimator, Quantile | Slack):
        return {"clip_norm": estimator.level.clip_norm, "fractions": list(estimator.level.fractions)}
    if isinstance(estimator, Centred | TwoThreshold):
        held = estimator.centre if isinstance(estimator, Centred) else estimator.average
        return {"vectors": {name: value.detach().cpu() for name, value in held.items()}} if held else {}
    return {}


def _refuse_options(name: str, given: Mapping[str, Any] | None, known: tuple[str, ...]) -> None:
    odd = sorted(key for key, value in (given or {}).items() if key not in known or value is False)
    if odd:
        raise ValueError(
            f"expected nothing in {name}{f' but {known}' if known else ''}; got {odd}: the file is always written whole, and "
            "read without running code; leave it out"
        )


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _shown(place: Place) -> str:
    return str(place) if isinstance(place, str | os.PathLike) else "a file-like object"
