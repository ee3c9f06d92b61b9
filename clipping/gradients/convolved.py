# SPDX-License-Identifier: Apache-2.0
"""The gradients of a convolution's weight, held as its input and output gradient.

The patches that each output position saw are never kept: they hold every input number once for each element of
the kernel. Per-example gradients come from one convolution over B times as many groups, the weighted sum from
the ordinary gradient of the weight.

Shapes: B examples, K channel groups, C input channels, T output positions, P outputs per group,
D = C / K * kernel elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipping.gradients.outer import Outer
from clipping.gradients.path_costs import Sizes
from clipping.gradients.sample_grads import Norms, rounded_up
from clipping.rounding.norms import (
    ROUNDING,
    accumulator_dtype,
    chunks,
    kept,
    per_example,
    rounding_of,
    row_norm,
    widen,
)
from clipping.rounding.products import LONG, epsilons

MIN_CHANNELS = 16
"""Input channels per group from which a convolution over the examples beats a product with patches (measured)."""


class Geometry(NamedTuple):
    """A convolution of an input that is padded already where its padding is not zeros."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def weight_gradient(
    values: Tensor, grad: Tensor, shape: torch.Size, geometry: Geometry, groups: int
) -> Tensor:
    """(*shape): gradient of the weight of a convolution with `groups` groups, summed over the batch."""
    zeros = [0] * len(geometry.kernel)
    # Only the shape of the weight matters; nothing is allocated for it.
    weight = values.new_empty(1).expand(shape)
    found = torch.ops.aten.convolution_backward(
        grad, values, weight, None, list(geometry.stride), list(geometry.padding), list(geometry.dilation),
        False, zeros, groups, [False, True, False],
    )  # fmt: skip
    return found[1]


def patches(values: Tensor, geometry: Geometry) -> Tensor:
    """(B, C, ...) input to the patches (B, K, T, D) that each output position saw."""
    pads = [pad for size in reversed(geometry.padding) for pad in (size, size)]
    values = F.pad(values, pads) if any(pads) else values
    num_dims = values.dim() - 2
    for dim in range(num_dims):
        kernel, stride, dilation = geometry.kernel[dim], geometry.stride[dim], geometry.dilation[dim]
        values = values.unfold(2 + dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    num_examples, num_channels = values.shape[:2]
    grouped = values.unflatten(1, (geometry.groups, num_channels // geometry.groups))
    positions = list(range(3, 3 + num_dims))
    kernel_dims = list(range(3 + num_dims, 3 + 2 * num_dims))
    # Positions last while copying: the inner loop then runs along a row of the image.
    ordered = grouped.permute(0, 1, 2, *kernel_dims, *positions)
    num_positions = math.prod(ordered.shape[3 + num_dims :])
    width = num_channels // geometry.groups * math.prod(geometry.kernel)
    return ordered.reshape(num_examples, geometry.groups, width, num_positions).mT


def split_gradient(
    values: Tensor, grad: Tensor, shape: torch.Size, geometry: Geometry, groups: int
) -> Tensor:
    """`weight_gradient`, added up by halves of the first output dimension down to LONG positions."""
    rows = grad.shape[2]
    if rows == 1 or grad.shape[2:].numel() <= LONG:
        return weight_gradient(values, grad, shape, geometry, groups)
    if any(geometry.padding):
        values = F.pad(values, [pad for size in reversed(geometry.padding) for pad in (size, size)])
        geometry = geometry._replace(padding=(0,) * len(geometry.padding))
    half, stride = rows // 2, geometry.stride[0]
    reach = geometry.dilation[0] * (geometry.kernel[0] - 1) + 1
    parts = []
    for start, end in ((0, half), (half, rows)):
        seen = values[:, :, start * stride : (end - 1) * stride + reach]
        parts.append(split_gradient(seen, grad[:, :, start:end], shape, geometry, groups))
    return parts[0].add_(parts[1])


@dataclass(frozen=True, slots=True, eq=False)
class Convolved:
    """Gradients of a convolution's weight of shape `shape`: input (B R, C, ...), output gradient (B R, K P, ...).

    R `repeats` lie one after another for each example: the frames of a film, say.
    """

    values: Tensor
    grad: Tensor
    shape: torch.Size
    geometry: Geometry
    repeats: int = 1

    @property
    def num_examples(self) -> int:
        """B."""
        return self.values.shape[0] // self.repeats

    def sizes(self) -> Sizes:
        """What decides on the path to norm and sum."""
        num_groups, num_positions = self.geometry.groups, self.repeats * self.grad.shape[2:].numel()
        held = self.repeats * (self.values.shape[1:].numel() + self.grad.shape[1:].numel())
        return Sizes(num_groups, num_positions, self.shape[0] // num_groups, self.shape[1:].numel(), held)

    def outer(self) -> Outer:
        """The same gradients as outer products over output positions, patches formed."""
        left = self.grad.flatten(2).unflatten(1, (self.geometry.groups, -1)).mT
        right = patches(self.values, self.geometry)
        if self.repeats > 1:
            left, right = (self._apart(x).transpose(1, 2).flatten(2, 3) for x in (left, right))
        return Outer(left, right, self.shape)

    def _apart(self, values: Tensor) -> Tensor:
        """(B, R, ...) from (B R, ...)."""
        return values.unflatten(0, (-1, self.repeats)) if self.repeats > 1 else values.unsqueeze(1)

    def _beside(self, values: Tensor) -> Tensor:
        """(R, B C, ...): the examples as groups of channels."""
        return self._apart(values).transpose(0, 1).flatten(1, 2)

    def dense(self) -> Tensor:
        """(B, *shape)."""
        num_examples = self.num_examples
        if self.shape[1] < MIN_CHANNELS or num_examples == 0:
            return self.outer().dense()
        found = split_gradient(
            self._beside(widen(self.values)),
            self._beside(widen(self.grad)),
            torch.Size((num_examples * self.shape[0], *self.shape[1:])),
            self.geometry,
            num_examples * self.geometry.groups,
        )
        return found.view(num_examples, *self.shape)

    def sq_norm(self) -> Tensor:
        """(B,), through the Gram matrices of the positions or through the gradients, whichever costs less."""
        return self.norms().squares

    def norms(self) -> Norms:
        """`sq_norm`, and how much of it is rounding up."""
        num_groups, num_positions, num_out, num_in, _ = self.sizes()
        gram = num_positions == 1 or num_positions * (num_out + num_in) <= num_out * num_in
        # `split_gradient` splits no row, and the Gram path allows for LONG positions in one go.
        gram = gram and self.grad.shape[3:].numel() <= LONG
        elements = num_positions * num_in if gram else self.shape.numel()
        parts = []
        for part in chunks(self.num_examples, num_groups * elements):
            some = self.part(part)
            parts.append(some.outer().norms() if gram else some.formed_norms())
        none = torch.zeros(0, dtype=accumulator_dtype(self.grad.dtype), device=self.grad.device)
        return Norms.joined(parts, none)

    def formed_norms(self) -> Norms:
        """(B,), through the gradients; how much of it is rounding up."""
        # Twice: the weighted sum errs as the forming does.
        return rounded_up(row_norm(self.dense()), 2 * self.forming())

    def forming(self) -> Tensor:
        """(B,): most by which rounding moves the gradients as they are formed; no fast algorithm is foreseen."""
        sizes = self.grad.shape[2:]
        rows, row = sizes[0], max(1, sizes[1:].numel())
        longest = self.repeats * min(max(LONG, row), rows * row)
        count = ROUNDING + longest / 2 + max(0, rows - 1).bit_length() / 2
        terms = self._terms()
        return epsilons(count, terms.dtype) * terms

    def inner(self, direction: Tensor) -> Tensor:
        """(B,), as one convolution of the input with the direction."""
        values, grad, groups = widen(self.values), widen(self.grad), self.geometry.groups
        if self.num_examples == 0:
            return grad.new_zeros(0)
        weight = direction.to(values.dtype)
        if per_example(direction, self.shape):
            groups *= self.num_examples
            weight = weight.reshape(-1, *self.shape[1:])
            values, grad = self._beside(values), self._beside(grad)
        _, stride, padding, dilation, _ = self.geometry
        moved = torch.convolution(
            values, weight, None, stride, padding, dilation, False, [0] * len(stride), groups
        )
        found = moved * grad
        if per_example(direction, self.shape):
            return found.unflatten(1, (self.num_examples, -1)).transpose(0, 1).flatten(1).sum(1)
        return self._apart(found).flatten(1).sum(1)

    def weighted_sum(self, weights: Tensor, into: Tensor | None = None) -> Tensor:
        """(*shape), as the ordinary gradient of the weight, output gradients scaled."""
        values, grad = widen(self.values), widen(self.grad)
        weights = weights.to(grad.dtype).repeat_interleave(self.repeats)
        scaled = grad * weights.view(-1, *[1] * (grad.dim() - 1))
        if self.num_examples == 0:
            return torch.zeros(self.shape, dtype=grad.dtype, device=grad.device) if into is None else into
        total = split_gradient(values, scaled, self.shape, self.geometry, self.geometry.groups)
        return total if into is None else into.add_(total)

    def masked(self, keep: Tensor) -> Convolved:
        """Gradients of examples outside `keep` set to zero."""
        keep = keep.repeat_interleave(self.repeats)
        return replace(self, values=kept(self.values, keep), grad=kept(self.grad, keep))

    def part(self, examples: slice) -> Convolved:
        """Gradients of a slice of the batch."""
        start, stop, _ = examples.indices(self.num_examples)
        rows = slice(start * self.repeats, stop * self.repeats)
        return replace(self, values=self.values[rows], grad=self.grad[rows])

    def rounding(self) -> Tensor:
        """(B,): relative to |output gradient| |patches|."""
        return rounding_of(self._terms(), self.shape[1:].numel())

    def _terms(self) -> Tensor:
        # A patch holds an input number at most once for each element of the kernel.
        repeats = math.sqrt(math.prod(self.geometry.kernel))
        return repeats * row_norm(self._apart(self.values)) * row_norm(self._apart(self.grad))
