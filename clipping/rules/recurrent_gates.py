# SPDX-License-Identifier: Apache-2.0
"""The gates of recurrent cells: their gradients at every position, given the states and the states' gradients.

With the states known, all gates of all positions are one product, and only the gradient of the states walks
back through time, one product of (B, P) by (P, H) at each position.

Shapes: B examples, T positions, D inputs, H hidden units, P outputs (H, or the size of the projection),
G gates (4 of LSTM, 3 of GRU, 1 of RNN).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from clipping.gradients.dense import Dense
from clipping.gradients.outer import Outer
from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.norms import widen
from clipping.rules.registry import trainable


class Cell(NamedTuple):
    """One layer in one direction: its parameters, under their names up to the suffix ("_l0_reverse", "")."""

    layer: nn.Module
    suffix: str

    def get(self, name: str) -> Tensor | None:
        """The parameter `name`, None where the layer has none."""
        found = self.layer._parameters.get(name + self.suffix)
        return None if found is None else found.detach()

    def linear(self, name: str, values: Tensor) -> Tensor:
        """(T, B, G * H): `values` times a weight, plus its bias."""
        weight = self.get(f"weight_{name}")
        assert weight is not None
        return nn.functional.linear(values.to(weight.dtype), weight, self.get(f"bias_{name}"))


class Run(NamedTuple):
    """What a cell saw, time first: inputs (T, B, D), states before each position (T, B, P), the first c (B, H).

    `last` (B,) is the last position of each example where they differ: what comes behind it is padding, without gradient.
    """

    inputs: Tensor
    before: Tensor
    first_c: Tensor | None
    last: Tensor | None = None


class Steps(NamedTuple):
    """Gradients (T, B, G * H) of the gates as the input and as the state enter them.

    `projection` is the gradient of the projected state and the state before projection, where there is one.
    """

    from_inputs: Tensor
    from_state: Tensor
    projection: tuple[Tensor, Tensor] | None


Backward = Callable[[Cell, Run, Tensor, Tensor | None], Steps]
"""(cell, run, gradients (T, B, P) of the states, gradient (B, H) of the last c) -> gradients of the gates."""


def _walk_back(grad: Tensor, factors: Tensor, kept: Tensor | None, weight: Tensor) -> Tensor:
    """(T, B, P): gradients of the states, where gate g gets `factors[t, :, g]` times the state's gradient."""
    num_positions, num_examples, num_gates, hidden = factors.shape
    total = grad.clone()
    for t in range(num_positions - 1, 0, -1):
        gates = (total[t].unsqueeze(1) * factors[t]).reshape(num_examples, num_gates * hidden)
        total[t - 1].addmm_(gates, weight)
        if kept is not None:
            total[t - 1].addcmul_(total[t], kept[t])
    return total


def _elman(activation_slope: Callable[[Tensor], Tensor]) -> Backward:
    def backward(cell: Cell, run: Run, grad: Tensor, _: Tensor | None) -> Steps:
        factors = activation_slope(_gates(cell, run))
        weight = widen(cast(Tensor, cell.get("weight_hh")))
        total = _walk_back(widen(grad), factors.unsqueeze(2), None, weight)
        gates = total * factors
        return Steps(gates, gates, None)

    return backward


def _gates(cell: Cell, run: Run) -> Tensor:
    return widen(cell.linear("ih", run.inputs) + cell.linear("hh", run.before))


def gru_backward(cell: Cell, run: Run, grad: Tensor, _: Tensor | None) -> Steps:
    """Gates r, z, n: h' = (1 - z) n + z h, with n = tanh(x_n + r h_n)."""
    x_r, x_z, x_n = widen(cell.linear("ih", run.inputs)).chunk(3, -1)
    h_r, h_z, h_n = widen(cell.linear("hh", run.before)).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    to_n = (1 - z) * (1 - n * n)
    to_r = to_n * h_n * r * (1 - r)
    to_z = (widen(run.before) - n) * z * (1 - z)
    factors = torch.stack((to_r, to_z, to_n * r), 2)
    total = _walk_back(widen(grad), factors, z, widen(cast(Tensor, cell.get("weight_hh"))))
    from_state = (total.unsqueeze(2) * factors).flatten(2)
    return Steps(torch.cat((total * to_r, total * to_z, total * to_n), -1), from_state, None)


def lstm_backward(cell: Cell, run: Run, grad: Tensor, last_c: Tensor | None) -> Steps:
    """Gates i, f, g, o: c' = f c + i g, h' = o tanh(c'), projected where there is a `weight_hr`."""
    i, f, g, o = _gates(cell, run).chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    assert run.first_c is not None
    before_c = torch.empty_like(i)
    c, after = widen(run.first_c), torch.empty_like(i)
    for t, increment in enumerate(i * g):
        before_c[t] = c
        c = torch.addcmul(increment, f[t], c)
        after[t] = c
    tanh_c = torch.tanh(after)
    to_c = o * (1 - tanh_c * tanh_c)
    factors = (g * i * (1 - i), before_c * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o))
    weight, projection = widen(cast(Tensor, cell.get("weight_hh"))), cell.get("weight_hr")
    projection = None if projection is None else widen(projection)
    given_c = torch.zeros_like(c) if last_c is None else widen(last_c)
    total, grad_c = widen(grad).clone(), given_c.clone() if run.last is None else torch.zeros_like(c)
    gates = i.new_empty(*i.shape[:2], 4, i.shape[2])
    stacked = torch.stack(factors, 2)
    for t in range(len(total) - 1, -1, -1):
        if run.last is not None:
            grad_c.addcmul_(given_c, (run.last == t).unsqueeze(1).to(given_c.dtype))
        hidden = total[t] if projection is None else total[t] @ projection
        grad_c.addcmul_(hidden, to_c[t])
        torch.mul(stacked[t, :, :3], grad_c.unsqueeze(1), out=gates[t, :, :3])
        torch.mul(stacked[t, :, 3], hidden, out=gates[t, :, 3])
        grad_c.mul_(f[t])
        if t > 0:
            total[t - 1].addmm_(gates[t].flatten(1), weight)
    gates = gates.flatten(2)
    return Steps(gates, gates, None if projection is None else (total, o * tanh_c))


BACKWARD: dict[str, Backward] = {
    "LSTM": lstm_backward,
    "GRU": gru_backward,
    "RNN_TANH": _elman(lambda gates: 1 - torch.tanh(gates).square()),
    "RNN_RELU": _elman(lambda gates: (gates > 0).to(gates.dtype)),
}


def _positions(values: Tensor) -> Tensor:
    return values.transpose(0, 1).unsqueeze(1)


def collect(cell: Cell, run: Run, steps: Steps) -> dict[str, SampleGrads]:
    """The gradients of one cell's trainable parameters."""
    found: dict[str, SampleGrads] = {}
    sources = {"ih": (steps.from_inputs, run.inputs), "hh": (steps.from_state, run.before)}
    for kind, (gates, values) in sources.items():
        weight, bias = f"weight_{kind}{cell.suffix}", f"bias_{kind}{cell.suffix}"
        if trainable(cell.layer, weight):
            shape = torch.Size((gates.shape[-1], values.shape[-1]))
            found[weight] = Outer(_positions(gates), _positions(values), shape)
        if trainable(cell.layer, bias):
            found[bias] = Dense(gates.sum(0))
    name = f"weight_hr{cell.suffix}"
    if steps.projection is not None and trainable(cell.layer, name):
        grad, values = steps.projection
        found[name] = Outer(
            _positions(grad), _positions(values), torch.Size((grad.shape[-1], values.shape[-1]))
        )
    return found
