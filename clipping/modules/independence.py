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
from typing import NamedTuple

import torch
from torch import Tensor

from clipping.modules.generic_rule import agree
from clipping.modules.observed_forward import NotApart, Observed, Subject
from clipping.reruns.one_example import Batch, BatchDims, Engine
from clipping.reruns.reruns import Rerun


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
