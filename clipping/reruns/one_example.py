# SPDX-License-Identifier: Apache-2.0
"""The own code of a module run on one example at a time: by vmap, or in a loop where vmap cannot.

Shapes: B examples, each with the same number of rows of every tensor that holds the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipping.reruns.draws import Draw, Handing
from clipping.reruns.reruns import Rerun, Run


class BatchDims(NamedTuple):
    """The batch dimension of each input leaf and each floating-point output; None where all examples share it."""

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


class Batch(NamedTuple):
    """The leaves of one call, where the batch is in them, and what it drew (None: nothing)."""

    leaves: Sequence[object]
    dims: BatchDims
    num_examples: int
    draws: list[Draw] | None

    def rows(self, value: Tensor, dim: int) -> Tensor:
        """`value` with dimension `dim` split into examples and their rows."""
        return value.unflatten(dim, (self.num_examples, value.shape[dim] // self.num_examples))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The leaves that hold the batch, split."""
        pairs = zip(self.leaves, self.dims.inputs, strict=True)
        return tuple(self.rows(x, d) for x, d in pairs if d is not None and isinstance(x, Tensor))

    @property
    def part_dims(self) -> tuple[int, ...]:
        """Where the examples are in `parts`."""
        return tuple(d for d in self.dims.inputs if d is not None)

    def leaves_of(self, parts: Sequence[Tensor]) -> list[object]:
        """All leaves, with `parts` in the place of those that hold the batch."""
        supply = iter(parts)
        pairs = zip(self.leaves, self.dims.inputs, strict=True)
        # Copies: the module may change what it is given in place.
        return [x if d is None else next(supply).clone() for x, d in pairs]

    def handing(self, example: int | None) -> AbstractContextManager[object]:
        """Gives out what the batch drew; nothing where it drew nothing."""
        if self.draws is None:
            return nullcontext()
        return _finished(Handing(self.draws, self.num_examples, example))


@contextmanager
def _finished(handing: Handing) -> Iterator[None]:
    with handing:
        yield
    handing.finish()


def _math() -> AbstractContextManager[object]:
    """The fused kernels of attention know no vmap, and fall back to a loop."""
    return sdpa_kernel(SDPBackend.MATH)


def _constant(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in parameters.items()}


# -- outputs ----------------------------------------------------------------------------------------------------


def outputs_by_vmap(rerun: Rerun, batch: Batch, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """What each example gives alone, (B, ...) each."""
    with rerun.sources.preserved(), rerun.prepared() as run, torch.no_grad(), _math(), batch.handing(None):
        fixed = _constant(parameters)
        each = vmap(
            lambda parts: run(batch.leaves_of(parts), fixed),
            in_dims=(batch.part_dims,),
            randomness="different",
        )
        return each(batch.parts)


def outputs_by_loop(rerun: Rerun, batch: Batch, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """The same, one example after the other."""
    found = []
    with rerun.prepared() as run, torch.no_grad():
        for index in range(batch.num_examples):
            with rerun.sources.preserved(), batch.handing(index):
                found.append(run(_leaves_at(batch, index), _constant(parameters)))
    return [torch.stack(x) for x in zip(*found, strict=True)]


def _leaves_at(batch: Batch, index: int) -> list[object]:
    pairs = zip(batch.parts, batch.part_dims, strict=True)
    return batch.leaves_of([x.select(d, index) for x, d in pairs])


# -- gradients --------------------------------------------------------------------------------------------------

Cotangents = Sequence[Tensor | None]
"""The gradient of each output of the own code, in the batch's shape; None: nothing depends on it."""


class Found(NamedTuple):
    """(B, *shape) for each parameter, and the outputs (B, ...) that each example gave."""

    gradients: dict[str, Tensor]
    outputs: Sequence[Tensor]


def gradients_by_vmap(
    rerun: Rerun, batch: Batch, parameters: Mapping[str, Tensor], cotangents: Cotangents
) -> Found:
    """The gradients of all examples at once."""
    pairs = enumerate(zip(cotangents, batch.dims.outputs, strict=True))
    present = [(i, batch.rows(c, d), d) for i, (c, d) in pairs if c is not None and d is not None]
    with rerun.sources.preserved(), rerun.prepared() as run:

        def paired(
            values: dict[str, Tensor], parts: tuple[Tensor, ...], sent: tuple[Tensor, ...]
        ) -> tuple[Tensor, list[Tensor]]:
            outputs = run(batch.leaves_of(parts), values)
            pairs = zip(present, sent, strict=True)
            return torch.stack([(outputs[i] * c.conj()).sum().real for (i, _, _), c in pairs]).sum(), outputs

        in_dims = (None, batch.part_dims, tuple(d for _, _, d in present))
        sent = tuple(c for _, c, _ in present)
        with torch.enable_grad(), _math(), batch.handing(None):
            each = vmap(grad(paired, has_aux=True), in_dims=in_dims, randomness="different")
            return Found(*each(_constant(parameters), batch.parts, sent))


def gradients_by_loop(
    rerun: Rerun, batch: Batch, parameters: Mapping[str, Tensor], cotangents: Cotangents
) -> Found:
    """The same, one example after the other."""
    found: list[Found] = []
    with rerun.prepared() as run:
        for index in range(batch.num_examples):
            with torch.enable_grad(), rerun.sources.preserved(), batch.handing(index):
                found.append(_one_gradient(run, batch, index, parameters, cotangents))
    gradients = {name: torch.stack([x.gradients[name] for x in found]) for name in parameters}
    return Found(gradients, [torch.stack(x) for x in zip(*(x.outputs for x in found), strict=True)])


def _one_gradient(
    run: Run, batch: Batch, index: int, parameters: Mapping[str, Tensor], cotangents: Cotangents
) -> Found:
    variables = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    outputs = run(_leaves_at(batch, index), variables)
    sent = [
        (out, batch.rows(c, d).select(d, index))
        for out, c, d in zip(outputs, cotangents, batch.dims.outputs, strict=True)
        if c is not None and d is not None and out.requires_grad
    ]
    return Found(backward(sent, variables), [x.detach() for x in outputs])


def backward(sent: Sequence[tuple[Tensor, Tensor]], variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of each variable, a leaf, where these outputs have these gradients; zeros where none arrives."""
    if sent:
        outputs, grads = zip(*sent, strict=True)
        torch.autograd.backward(outputs, grads, inputs=list(variables.values()))
    found = {}
    for name, x in variables.items():
        found[name] = torch.zeros_like(x) if x.grad is None else x.grad
        x.grad = None
    return found


class Engine(NamedTuple):
    """One way to run example by example."""

    name: str

    def outputs(self, rerun: Rerun, batch: Batch, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """(B, ...) each."""
        return (outputs_by_vmap if self.name == "vmap" else outputs_by_loop)(rerun, batch, parameters)

    def gradients(
        self, rerun: Rerun, batch: Batch, parameters: Mapping[str, Tensor], cotangents: Cotangents
    ) -> Found:
        """(B, *shape) for each parameter, and the outputs."""
        by = gradients_by_vmap if self.name == "vmap" else gradients_by_loop
        return by(rerun, batch, parameters, cotangents)


VMAP, LOOP = Engine("vmap"), Engine("loop")
