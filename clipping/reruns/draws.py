# SPDX-License-Identifier: Apache-2.0
"""The random numbers of one forward: taken down as it runs on the batch, and given to each example as its own.

A module that is run again for one example would draw other numbers than it drew for the batch, and outputs that agree
prove nothing about them (a layer scale of 1e-6 hides a mask). So the forward runs again on the batch from the
generator's state at its beginning, its draws are taken down operation by operation, and each operation of a run on one
example gets its own rows of them: those of the one dimension in which the two differ by the number of examples. A
draw of one shape in both is shared by all examples. Anything else is refused.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from clipping.reruns.random_state import Sources

_PURE = frozenset(
    "bernoulli binomial cauchy exponential geometric log_normal multinomial native_dropout normal poisson rand randint"
    " randn random randperm rrelu_with_noise uniform _sample_dirichlet _standard_gamma".split()
)


class Unreplayable(RuntimeError):
    """Random numbers that cannot be given to each example as the batch drew them."""


class Draw(NamedTuple):
    """What one random operation gave: its kind and its tensors, those that it filled in place first."""

    kind: str
    tensors: tuple[Tensor, ...]


def _kind(operation: Any) -> str:
    name = operation._schema.name.split("::")[1].rstrip("_")
    return name.removesuffix("_like")


def _drawn(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> list[Tensor]:
    """The tensors that `operation` filled with random numbers."""
    found: list[Tensor] = []
    for position, argument in enumerate(operation._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, Tensor):
            found.append(value)
    own = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    return found + [x for x in own if all(x is not y for y in found)]


class TakingDown(TorchDispatchMode):
    """Takes down every random operation inside; `silent` while a child runs, whose draws are its own."""

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self._sources = sources

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and keep what it drew."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if _kind(func) in _PURE:
            result = func(*args, **kwargs)
            tensors = tuple(x.clone() for x in _drawn(func, args, kwargs, result))
            self.draws.append(Draw(_kind(func), tensors))
            return result
        before = self._sources.read()  # fused kernels draw only if there is something to drop
        result = func(*args, **kwargs)
        if not self._sources.read().same(before):
            raise Unreplayable(f"{func} draws inside a fused kernel, which cannot draw the same again")
        return result


class Handing(TorchDispatchMode):
    """Gives each random operation the numbers that were taken down: all examples' (under vmap), or those of one.

    `example` is None under vmap, whose operations see the B examples in their first dimension.
    """

    def __init__(self, draws: list[Draw], num_examples: int, example: int | None) -> None:
        super().__init__()
        self._supply: Iterator[Draw] = iter(draws)
        self._num_examples = num_examples
        self._example = example

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and replace what it drew."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags or _kind(func) not in _PURE:
            return result
        draw = next(self._supply, None)
        tensors = _drawn(func, args, kwargs, result)
        if draw is None or draw.kind != _kind(func) or len(draw.tensors) != len(tensors):
            raise Unreplayable(f"{func} draws for one example, not for the batch, or in another order")
        for tensor, known in zip(tensors, draw.tensors, strict=True):
            tensor.copy_(self._part(known, tensor))
        return result

    def finish(self) -> None:
        """Raise where draws of the batch were not asked for."""
        if next(self._supply, None) is not None:
            raise Unreplayable("the batch draws more often than one example does")

    def _part(self, known: Tensor, tensor: Tensor) -> Tensor:
        shape = tensor.shape if self._example is not None else tensor.shape[1:]
        if known.shape == shape:
            return known if self._example is not None else known.expand_as(tensor)
        dims = [d for d, (a, b) in enumerate(zip(known.shape, shape, strict=False)) if a != b]
        if (
            known.dim() != len(shape)
            or len(dims) != 1
            or known.shape[dims[0]] != self._num_examples * shape[dims[0]]
        ):
            raise Unreplayable(
                f"a draw of shape {tuple(known.shape)} for the batch has shape {tuple(shape)} for one example"
            )
        rows = known.unflatten(dims[0], (self._num_examples, shape[dims[0]]))
        return rows.movedim(dims[0], 0) if self._example is None else rows.select(dims[0], self._example)
