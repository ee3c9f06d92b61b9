# SPDX-License-Identifier: Apache-2.0
"""Weights and checkpoints that Opacus saved: the names of a wrapped model, and a history that was kept beside them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from accountants import Gaussian, PoissonSampled, Record, Repeated, read
from dpopt.training import PrivateTraining

PREFIX = "_module."


def without_prefix(keys: Iterable[str]) -> dict[str, str]:
    """{new key: key} of a state_dict of a model that Opacus had wrapped; unchanged unless every key has the prefix."""
    names = list(keys)
    wrapped = _is_prefixed(names)
    return {(name.removeprefix(PREFIX) if wrapped else name): name for name in names}


def _is_prefixed(keys: Iterable[str]) -> bool:
    names = list(keys)
    return bool(names) and all(name.startswith(PREFIX) for name in names)


def for_module(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` under the names that `module` has: without the prefix, unless the module's own names have it."""
    if _is_prefixed(module.state_dict()):
        return dict(state)
    return {new: state[old] for new, old in without_prefix(state).items()}


def accept_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Hook of `load_state_dict`: take the weights of a model that Opacus had wrapped, whose keys say `_module.`."""
    if prefix:
        return
    renamed = for_module(module, state_dict)
    state_dict.clear()
    state_dict.update(renamed)


def charge_history(training: PrivateTraining, found: Mapping[str, Any]) -> None:
    """Charge what Opacus had counted before it wrote this checkpoint, once on a ledger: the weights have spent it.

    Raises:
        ValueError: the checkpoint has no history.
    """
    history = dict(found.get("privacy_accountant_state_dict") or {}).get("history")
    if history is None:
        raise ValueError(
            "expected a checkpoint that says what was spent; got one without privacy_accountant_state_dict; load public "
            'weights by module.load_state_dict(torch.load(path)["module_state_dict"])'
        )
    mark = _digest(found)
    records = read(training.ledger_path).records
    if any(_mark(record) == mark for record in records):
        return
    for noise, rate, steps in history:
        event = Repeated(PoissonSampled(float(rate), Gaussian(float(noise))), int(steps))
        training.ledger.charge(event, context={"checkpoint": mark})
    total = sum(int(steps) for _, _, steps in history)
    print(
        f"dpopt: {total} steps that the checkpoint's own history counts, as Poisson-sampled ones, are charged to "
        f"{training.ledger_path}",
        file=sys.stderr,
    )


def _digest(found: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(repr(found["privacy_accountant_state_dict"]).encode())
    for name, value in sorted(found["module_state_dict"].items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _mark(record: Record) -> object:
    context = record.payload.get("context")
    return context.get("checkpoint") if isinstance(context, Mapping) else None
