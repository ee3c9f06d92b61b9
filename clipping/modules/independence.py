# SPDX-License-Identifier: Apache-2.0
"""The proof that a module without a rule keeps its examples apart, and the choice of how it is differentiated.

Before a module runs for good for the first time, it runs once on the batch, and once on each example alone, with the
random numbers that the batch drew. It is accepted where each example's outputs are its rows of the batch's, and where
for some examples the gradients of all parameters agree too: a layer scale of 1e-6, or of 0, hides from the outputs
what the gradient of that scale shows. Nothing is left to chance: with another mask the same is decided.

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
from clipping.modules.observed_forward import NotApart, Observed, Subject, observe
from clipping.reruns.checkpointing import unpacked
from clipping.reruns.draws import Draw, Unreplayable
from clipping.reruns.one_example import LOOP, VMAP, Batch, BatchDims, Engine
from clipping.reruns.random_state import Sources
from clipping.reruns.reruns import Rerun, Strayed
from clipping.rules.dropouts import draws_unseen

MOST_OPENED = 64
"""Times that a trial starts again with one child more whose code counts as its parent's."""


class Differs(Exception):
    """Examples alone give something else than in the batch."""


class Proof(NamedTuple):
    """Where the batch is, which parameters the own code uses, and whether all numbers were finite."""

    dims: BatchDims
    used: frozenset[str]
    complete: bool


def prove(subject: Subject, seen: Observed, rerun: Rerun, engine: Engine, batch: Batch) -> Proof:
    """Raise `Differs` unless examples alone give their rows of the batch, outputs and gradients."""
    batched = [*seen.outputs, *seen.inputs]
    parameters = {name: x.detach() for name, x in seen.variables.items()}
    alone = engine.outputs(rerun, batch, parameters)
    if len(alone) != len(batched):
        raise Differs("another number of outputs")
    dims = BatchDims(batch.dims.inputs, tuple(_dim(a, b, batch) for a, b in zip(alone, batched, strict=True)))
    batch = batch._replace(dims=dims)
    rows = [_rows(x.detach(), d, batch) for x, d in zip(batched, dims.outputs, strict=True)]
    for one, row in zip(alone, rows, strict=True):
        if not agree(one, row):
            raise Differs("another output")
    finite = torch.stack([torch.isfinite(x).reshape(batch.num_examples, -1).all(1) for x in rows]).all(0)
    used = _compare_gradients(subject, seen, rerun, engine, batch, finite.tolist())
    return Proof(dims, used, bool(finite.all()))


def _dim(alone: Tensor, batched: Tensor, batch: Batch) -> int | None:
    """The dimension in which a batch's output is longer than an example's, by the number of examples."""
    shape = alone.shape[1:]
    if batch.num_examples == 1 and shape == batched.shape:
        return 0 if batched.dim() else None  # all rows are the example's
    dims = [d for d, (a, b) in enumerate(zip(shape, batched.shape, strict=False)) if a != b]
    if len(shape) != batched.dim() or len(dims) > 1:
        raise Differs("an output of another shape")
    if dims and batched.shape[dims[0]] != batch.num_examples * shape[dims[0]]:
        raise Differs("an output of another shape")
    return dims[0] if dims else None


def _rows(value: Tensor, dim: int | None, batch: Batch) -> Tensor:
    """(B, ...): each example's part; the whole, where all share it."""
    if dim is None:
        return value.expand(batch.num_examples, *value.shape)
    return batch.rows(value, dim).movedim(dim, 0)


# -- gradients --------------------------------------------------------------------------------------------------


def _compare_gradients(
    subject: Subject, seen: Observed, rerun: Rerun, engine: Engine, batch: Batch, finite: list[bool]
) -> frozenset[str]:
    """Send back one example's outputs, for some; the parameters that their gradients reached."""
    last = batch.num_examples - 1
    chosen = [i for i in dict.fromkeys((0, last, last // 2)) if finite[i]]
    if not chosen:
        return frozenset(seen.variables)
    sent = _cotangents(seen, batch)
    truth = {i: _sent_back(seen, batch, sent, i) for i in chosen}
    used = frozenset(name for found in truth.values() for name, g in found.gradients.items() if g is not None)
    cotangents = _assembled(seen, batch, sent, truth)
    parameters = {name: x.detach() for name, x in seen.variables.items() if name in used}
    if not used or all(c is None for c in cotangents):
        return used
    got = engine.gradients(rerun, batch, parameters, cotangents).gradients
    for index, found in truth.items():
        alone = {name: got[name][index] for name in used}
        if not _agree({n: g for n, g in found.gradients.items() if n in used}, alone):
            raise Differs("another gradient")
    return used


def _cotangents(seen: Observed, batch: Batch) -> list[Tensor | None]:
    """Random numbers for each output, from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor | None] = []
    for out, dim in zip(seen.outputs, batch.dims.outputs, strict=False):
        made = torch.randn(
            out.shape,
            generator=generator,
            device="cpu",
            dtype=torch.complex64 if out.is_complex() else torch.float32,
        )
        found.append(None if dim is None or not out.requires_grad else made.to(out))
    return found


class _Back(NamedTuple):
    """The gradients of the parameters and of the children's inputs, for one example's outputs."""

    gradients: dict[str, Tensor | None]
    inputs: dict[int, Tensor]


def _sent_back(seen: Observed, batch: Batch, sent: Sequence[Tensor | None], index: int) -> _Back:
    pairs = []
    for out, c, dim in zip(seen.outputs, sent, batch.dims.outputs, strict=False):
        if c is not None and dim is not None:
            kept = torch.zeros_like(c)
            batch.rows(kept, dim).select(dim, index).copy_(batch.rows(c, dim).select(dim, index))
            pairs.append((out, kept))
    if pairs:
        outputs, grads = zip(*pairs, strict=True)
        leaves = [*seen.variables.values(), *seen.watched.values()]
        torch.autograd.backward(outputs, grads, retain_graph=True, inputs=leaves)
    found = {name: x.grad for name, x in seen.variables.items()}
    reached = {position: x.grad for position, x in seen.watched.items()}
    for x in (*seen.variables.values(), *seen.watched.values()):
        x.grad = None
    inputs = dict(seen.run.arrivals.inputs)
    seen.run.arrivals.inputs.clear()
    _refuse_reached(batch, reached, index)
    return _Back(found, inputs)


def _refuse_reached(batch: Batch, grads: dict[int, Tensor | None], index: int) -> None:
    """Raise where another example's inputs got a gradient."""
    for position, grad in grads.items():
        dim = batch.dims.inputs[position] if position < len(batch.dims.inputs) else None
        if grad is None or dim is None or grad.shape != getattr(batch.leaves[position], "shape", None):
            continue
        rows = batch.rows(grad, dim).movedim(dim, 0)
        others = torch.arange(batch.num_examples, device=rows.device) != index
        reached = rows[others]
        if bool(((reached.abs() > 0) & torch.isfinite(reached)).any()):
            raise Differs("a gradient that reaches another example's inputs")


def _assembled(
    seen: Observed, batch: Batch, sent: Sequence[Tensor | None], truth: dict[int, _Back]
) -> list[Tensor | None]:
    """The gradients of all outputs of the own code, of the chosen examples; zero for the others."""
    found: list[Tensor | None] = []
    for c, dim in zip(sent, batch.dims.outputs, strict=False):
        found.append(None if c is None or dim is None else _picked({i: c for i in truth}, batch, dim))
    for number, dim in enumerate(batch.dims.outputs[len(seen.outputs) :]):
        arrived = {i: back.inputs[number] for i, back in truth.items() if number in back.inputs}
        if arrived and dim is None:
            raise NotApart((seen.run.modules_of_inputs[number],))
        found.append(_picked(arrived, batch, dim) if arrived and dim is not None else None)
    return found


def _picked(grads: dict[int, Tensor], batch: Batch, dim: int) -> Tensor:
    total = torch.zeros_like(next(iter(grads.values())))
    for index, grad in grads.items():
        batch.rows(total, dim).select(dim, index).copy_(batch.rows(grad, dim).select(dim, index))
    return total


def _agree(truth: dict[str, Tensor | None], alone: dict[str, Tensor]) -> bool:
    """Whether the gradients of one example agree within rounding, each parameter's by itself."""
    known = {name: torch.zeros_like(alone[name]) if g is None else g for name, g in truth.items()}
    largest = max(
        (float(g.abs().nan_to_num(0, 0, 0).max()) for g in known.values() if g.numel()), default=0.0
    )
    for name, grad in known.items():
        if grad.numel() == 0:
            continue
        half = grad.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(grad.device.type)
        tolerance = 1e-8 if grad.dtype == torch.float64 else 5e-2 if half else 2e-3
        allowed = tolerance * (float(grad.abs().max()) + 1e-3 * largest) + 1e-30
        difference = (alone[name] - grad).abs()
        if not bool((difference <= allowed).all()) and bool(torch.isfinite(difference).all()):
            return False
    return True


# -- the choice -------------------------------------------------------------------------------------------------


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
