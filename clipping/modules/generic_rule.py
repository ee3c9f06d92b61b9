# SPDX-License-Identifier: Apache-2.0
"""The rule for any other module that does not mix examples: its own code, differentiated example by example.

It costs a second forward and B times the parameters in memory, so it is meant for small or rare modules. What runs
again is the forward that ran: on its inputs, attributes and buffers, and with the numbers that it drew.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipping.gradients.dense import Dense
from clipping.gradients.sample_grads import SampleGrads
from clipping.modules.output_fingerprints import alike, fingerprint, tolerance_of
from clipping.reruns.checkpointing import unpacked
from clipping.reruns.draws import Draw, TakingDown, Unreplayable
from clipping.reruns.one_example import LOOP, VMAP, Batch, BatchDims, Engine, Found, backward
from clipping.reruns.reruns import Rerun, Strayed

__all__ = ["BatchDims", "agree", "batch_dim_of", "generic", "taken_down"]


def batch_dim_of(value: object, num_examples: int, batch_dim: int) -> int | None:
    """The dimension of `value` that holds the batch of a model whose batch is in `batch_dim`."""
    if not isinstance(value, Tensor):
        return None
    # Sequence-first models keep the batch first in what has no sequence: cell states (B, D), masks (B, T).
    single = value.dim() <= 2 and (value.is_floating_point() or value.is_complex())
    for dim in (0,) if single else (batch_dim, 0):
        if value.dim() > dim and value.shape[dim] == num_examples:
            return dim
    return None


def agree(alone: Tensor, batched: Tensor) -> bool:
    """Whether two tensors (B, ...) agree within rounding; an example of 1e38 does not excuse the others."""
    if alone.shape != batched.shape:
        return False
    tolerance = tolerance_of(batched)
    if batched.numel() == 0:
        return True
    finite = torch.isfinite(alone) & torch.isfinite(batched)
    rows = (torch.where(finite, x, torch.zeros_like(x)).reshape(len(x), -1) for x in (alone, batched))
    alone, batched = rows
    largest = batched.abs().amax(1, keepdim=True)
    largest = torch.maximum(largest, largest.median())
    return bool(((alone - batched).abs() <= tolerance * (1 + largest)).all())


def taken_down(
    rerun: Rerun, leaves: Sequence[object], parameters: Mapping[str, Tensor]
) -> tuple[list[Draw], list[Tensor]]:
    """What the batch drew, by running it again from its first random state; and its outputs."""
    with rerun.sources.preserved(), rerun.prepared() as run, torch.no_grad():
        with TakingDown(rerun.sources) as taking:
            outputs = run(_copies(leaves), {name: p.detach() for name, p in parameters.items()})
        end = rerun.sources.read()
        idle = not taking.draws and end.same(rerun.moment.before)  # another thread drew meanwhile
        if not idle and not end.same(rerun.moment.after):
            raise Unreplayable("run again from the same random state, it draws another number of times")
    return taking.draws, outputs


def _copies(leaves: Sequence[object]) -> list[object]:
    return [x.clone() if isinstance(x, Tensor) else x for x in leaves]


class Differentiated(NamedTuple):
    """Per-example gradients by name, and whether the examples gave what the forward gave: a flag on the device."""

    gradients: dict[str, SampleGrads]
    same: Tensor | None


def generic(
    rerun: Rerun,
    engine: Engine | None,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    cotangents: Sequence[Tensor | None],
    marks: Sequence[Tensor | None],
    why: str,
) -> Differentiated:
    """Per-example gradients of `parameters`.

    `cotangents` holds a gradient or None for each floating-point output of the own code, `marks` the fingerprints of
    those of the forward that ran. Without an `engine`, the batch is one example.
    """
    if engine is None:
        found = _alone(rerun, batch, parameters, cotangents)
        return Differentiated({name: Dense(value.unsqueeze(0), why) for name, value in found.items()}, None)
    if rerun.moment.moved:
        draws, again = taken_down(rerun, batch.leaves, parameters)
        same = _same(marks_of(again, batch.dims.outputs, batch), marks, again)
        if same is not None and not bool(same):
            raise Unreplayable("run again from the same random state, it gives another output")
        batch = batch._replace(draws=draws)
    each = _differentiated(rerun, engine, batch, parameters, cotangents)
    gradients: dict[str, SampleGrads] = {name: Dense(value, why) for name, value in each.gradients.items()}
    alone = [None if m is None else fingerprint(x) for x, m in zip(each.outputs, marks, strict=False)]
    return Differentiated(gradients, _same(alone, marks, each.outputs))


def marks_of(outputs: Sequence[Tensor], dims: Sequence[int | None], batch: Batch) -> list[Tensor | None]:
    """The fingerprint of each output that holds the batch."""
    pairs = zip(outputs, dims, strict=False)
    return [None if d is None else fingerprint(batch.rows(x, d).movedim(d, 0)) for x, d in pairs]


def _same(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], outputs: Sequence[Tensor]
) -> Tensor | None:
    flags = [
        alike(a, b, tolerance_of(x))
        for a, b, x in zip(first, second, outputs, strict=False)
        if a is not None and b is not None
    ]
    return torch.stack(flags).all() if flags else None


def _alone(
    rerun: Rerun, batch: Batch, parameters: Mapping[str, Tensor], cotangents: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    variables = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    with rerun.sources.preserved(), rerun.prepared() as run, torch.enable_grad():
        outputs = run(_copies(batch.leaves), variables)
        if rerun.moment.moved and not rerun.sources.read().same(rerun.moment.after):
            raise Unreplayable("run again from the same random state, it draws another number of times")
        pairs = zip(outputs, cotangents, strict=True)
        return backward([(out, c) for out, c in pairs if c is not None and out.requires_grad], variables)


def _differentiated(
    rerun: Rerun,
    engine: Engine,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    cotangents: Sequence[Tensor | None],
) -> Found:
    with unpacked():
        try:
            return engine.gradients(rerun, batch, parameters, cotangents)
        except (Unreplayable, Strayed):
            raise
        except (RuntimeError, TypeError, ValueError):
            if engine is not VMAP:
                raise
            return LOOP.gradients(rerun, batch, parameters, cotangents)  # a branch that vmap cannot take
