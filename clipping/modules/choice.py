# SPDX-License-Identifier: Apache-2.0
"""How a module without a rule is differentiated: ways are tried, until one is proven to keep examples apart.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clipping.errors import MixesExamples
from clipping.modules.differentiation import Manner, Size, candidates, children_dims, ratios
from clipping.modules.generic_rule import agree, taken_down
from clipping.modules.independence import Differs, Proof, prove
from clipping.modules.observed_forward import NotApart, Observed, Subject, observe
from clipping.reruns.checkpointing import unpacked
from clipping.reruns.draws import Draw, Unreplayable
from clipping.reruns.one_example import LOOP, VMAP, Batch, BatchDims, Engine
from clipping.reruns.random_state import Sources
from clipping.reruns.reruns import Rerun, Strayed
from clipping.rules.dropouts import draws_unseen

MOST_OPENED = 64
"""Times that a trial starts again with one child more whose code counts as its parent's."""


class Failure(NamedTuple):
    """Why one way did not do: `mixes` where examples came out otherwise, else it could not run."""

    mixes: bool
    why: str


def settle(
    subject: Subject, args: tuple[Any, ...], kwargs: dict[str, Any], size: Size, sources: Sources
) -> Manner:
    """The manner of calls like this one; raises `MixesExamples` or TypeError where there is none."""
    failures: list[Failure] = []
    with unpacked(), torch.enable_grad(), sources.preserved():
        for whole in (False, True):
            if not (whole or len(subject.layer.members) > 1):
                continue
            found = _settled(subject._replace(whole=whole), args, kwargs, size, sources, failures)
            if found is not None:
                return found
    raise _refusal(subject, failures)


def _settled(
    subject: Subject, args: Any, kwargs: Any, size: Size, sources: Sources, failures: list[Failure]
) -> Manner | None:
    for _ in range(MOST_OPENED):
        try:
            seen = observe(subject, args, kwargs, sources)
            if not seen.outputs:  # what it returns shows no tensor: nothing to differentiate, or refused
                return Manner(
                    False, None, BatchDims((), ()), {}, (), subject.places, (), sources, proven=False
                )
            if not subject.whole and not seen.run.calls:
                return None
            return _proven(subject, seen, size, failures)
        except NotApart as told:
            subject = subject._replace(opened=tuple(dict.fromkeys((*subject.opened, *told.modules))))
    return None


def _proven(subject: Subject, seen: Observed, size: Size, failures: list[Failure]) -> Manner | None:
    if draws_unseen(subject.layer.members if subject.whole else (subject.layer.module, *subject.opened)):
        failures.append(
            Failure(False, "dropout inside a fused recurrent layer; put nn.Dropout between single layers")
        )
        return None
    rerun, leaves = seen.rerun(subject), seen.all_leaves
    draws: list[Draw] | None = None
    if seen.moment.moved:
        try:
            parameters = {name: x.detach() for name, x in seen.variables.items()}
            draws, again = taken_down(rerun, leaves, parameters)
            if not _same(again, [*seen.outputs, *seen.inputs]):
                raise Unreplayable("run again from the same random state, it gives another output")
        except (Unreplayable, Strayed) as error:
            failures.append(Failure(False, str(error)))
            return None
    for engine in (VMAP, LOOP):
        batch = Batch(leaves, BatchDims((), ()), size.num_examples, draws)
        proof = _first_proof(subject, seen, rerun, engine, batch, size, failures)
        if proof is not None:
            return _manner(subject, seen, engine, proof, size, failures)
    return None


def _first_proof(
    subject: Subject,
    seen: Observed,
    rerun: Rerun,
    engine: Engine,
    batch: Batch,
    size: Size,
    failures: list[Failure],
) -> Proof | None:
    """The first that finds the batch in every output, else the first that finds it in some."""
    partial: Proof | None = None
    for dims in candidates(batch.leaves, len(seen.leaves), size):
        if all(dim is None for dim in dims):
            continue
        try:
            proof = prove(subject, seen, rerun, engine, batch._replace(dims=BatchDims(dims, ())))
        except Differs as error:
            failures.append(Failure(True, str(error)))
        except NotApart:
            raise
        except Exception as error:  # whatever the module or vmap raise for one example
            first = (str(error).splitlines() or [""])[0]
            failures.append(Failure(False, f"{type(error).__name__}: {first[:160]}"))
        else:
            if None not in proof.dims.outputs:
                return proof
            partial = partial or proof
    return partial


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        agree(a[None], b.detach()[None]) for a, b in zip(first, second, strict=True)
    )


def _manner(
    subject: Subject, seen: Observed, engine: Engine, proof: Proof, size: Size, failures: list[Failure]
) -> Manner:
    opened = {id(x) for x in (subject.layer.module, *subject.opened)}
    own = (
        not subject.whole or seen.checkpointed
    )  # which runs again in the backward, on the parameters themselves
    if subject.whole:
        subject = subject._replace(opened=subject.layer.members)
    places = tuple(
        place for place in subject.places if not own or place.name in proof.used or id(place.module) in opened
    )
    why = "a loop over the examples" if engine is LOOP else "vmap over the examples"
    if engine is LOOP and failures:
        why += f" ({failures[-1].why})"
    dims, children = children_dims(proof.dims, seen.run.calls)
    return Manner(
        own, engine, dims, children, _callable(subject, seen) if own else (), places,
        subject.opened, seen.sources, ratios(dims.inputs, seen.leaves, size.num_examples), seen.mutated, seen.changed, seen.run.changed, seen.moment.state is not None, proof.complete,
        why + (", children by their own rules" if seen.run.calls else ""),
    )  # fmt: skip


def _callable(subject: Subject, seen: Observed) -> tuple[nn.Module, ...]:
    """The children that the own code called, and those that it may call: its own, and those in its lists of modules."""
    found = {id(call.module): call.module for call in seen.run.calls}
    opened = {id(subject.layer.module): subject.layer.module, **{id(x): x for x in subject.opened}}
    lists = [x for module in opened.values() for x in module.children()]
    while lists:
        child = lists.pop()
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            lists += child.children()
        elif id(child) not in opened and not getattr(child, "inplace", False):
            found.setdefault(id(child), child)
    return tuple(found.values())


def _refusal(subject: Subject, failures: list[Failure]) -> Exception:
    layer = subject.layer
    named = f"module {layer.name or 'model'!r} ({type(layer.module).__name__}), which has no rule of its own,"
    mixes = [failure.why for failure in failures if failure.mixes]
    if mixes:
        return MixesExamples(
            f"expected {named} to give each example the output it gives that example alone; got {mixes[-1]}, so it mixes "
            "examples; keep the batch in one dimension of every output and take nothing from the whole batch (its mean, "
            "norm or size), or give the module a rule with @clipping.rule"
        )
    last = failures[-1].why if failures else "no tensor that holds the batch"
    return TypeError(
        f"expected {named} to run on one example at a time; got an operation that cannot ({last}); draw random numbers "
        "for each row of the batch or for all of them, with torch's generator, or give it a rule with @clipping.rule"
    )
