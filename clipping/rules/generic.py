# SPDX-License-Identifier: Apache-2.0
"""The rule for any other module that does not mix examples: its own code, differentiated example by example.

It costs a second forward and B times the parameters in memory, so it is meant for small or rare modules. What runs
again is the forward that ran: on its inputs, attributes and buffers, and with the numbers that it drew.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clipping.errors import MixesExamples
from clipping.grads import Dense, SampleGrads
from clipping.rules.checkpoints import unpacked
from clipping.rules.draws import Draw, TakingDown, Unreplayable
from clipping.rules.examples import LOOP, VMAP, Batch, BatchDims, Engine, Found, backward
from clipping.rules.reruns import Rerun, Strayed, is_floating

__all__ = ["BatchDims", "agree", "batch_dim_of", "generic", "is_floating", "taken_down"]


def batch_dim_of(value: object, num_examples: int, batch_dim: int) -> int | None:
    """The dimension of `value` that holds the batch of a model whose batch is in `batch_dim`."""
    if not isinstance(value, Tensor):
        return None
    # Sequence-first models keep the batch first in what has no sequence: cell states (B, D), masks (B, T).
    for dim in (batch_dim, 0) if value.dim() > 2 or not is_floating(value) else (0,):
        if value.dim() > dim and value.shape[dim] == num_examples:
            return dim
    return None


def agree(alone: Tensor, batched: Tensor) -> bool:
    """Whether two tensors (B, ...) agree within rounding; an example of 1e38 does not excuse the others."""
    if alone.shape != batched.shape:
        return False
    half = batched.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(batched.device.type)
    tolerance = 1e-9 if batched.dtype in (torch.float64, torch.complex128) else 5e-2 if half else 1e-3
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


def generic(
    rerun: Rerun,
    engine: Engine | None,
    batch: Batch,
    parameters: Mapping[str, Tensor],
    cotangents: Sequence[Tensor | None],
    outputs: Sequence[Tensor],
    why: str,
) -> dict[str, SampleGrads]:
    """Per-example gradients of `parameters`, by name.

    `cotangents` holds a gradient or None for each floating-point output of the own code, `outputs` those of the forward
    that ran where they must be given again. Without an `engine`, the batch is one example.
    """
    if engine is None:
        found = _alone(rerun, batch, parameters, cotangents)
        return {name: Dense(value.unsqueeze(0), why) for name, value in found.items()}
    if rerun.moment.moved:
        draws, again = taken_down(rerun, batch.leaves, parameters)
        if not all(agree(a[None], b[None]) for a, b in zip(again, outputs, strict=False)):
            raise Unreplayable("run again from the same random state, it gives another output")
        batch = batch._replace(draws=draws)
    each = _differentiated(rerun, engine, batch, parameters, cotangents)
    _compare(rerun, batch, each.outputs, outputs)
    return {name: Dense(value, why) for name, value in each.gradients.items()}


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


def _compare(rerun: Rerun, batch: Batch, alone: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Refuse another output than that of the forward: a branch that the whole batch decided on."""
    for one, known, dim in zip(alone, outputs, batch.dims.outputs, strict=False):
        if dim is not None and not agree(one, batch.rows(known, dim).movedim(dim, 0)):
            raise MixesExamples(
                f"expected {type(rerun.module).__name__}, which has no rule of its own, to give each example the output it "
                "gives that example alone; got another output in this batch, so it decides by the whole batch; decide for "
                "each row (torch.where)"
            )


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
