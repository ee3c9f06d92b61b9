# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers and cells of torch, as outer products over positions.

The layer's own fused kernel runs forward and backward. The rule runs one fused layer after the other again for
the hidden states, and takes the gradients of the gates from `gates`. Weights thus get Outer(gradient of the
gates, input or previous state), never B times their size.

Shapes: B examples, T positions, D inputs, H hidden units, P outputs (H, or the size of the projection).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from clipping.gradients.sample_grads import SampleGrads
from clipping.rounding.norms import widen
from clipping.rules.packed_sequences import padded
from clipping.rules.recurrent_gates import BACKWARD, Cell, Run, collect
from clipping.rules.registry import Inputs, batch_first, rule

State = tuple[Tensor, ...]
"""(h,) of GRU and RNN, (h, c) of LSTM."""


_FUSED: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch._VF.lstm,  # pyright: ignore[reportAttributeAccessIssue]
    "GRU": torch._VF.gru,  # pyright: ignore[reportAttributeAccessIssue]
    "RNN_TANH": torch._VF.rnn_tanh,  # pyright: ignore[reportAttributeAccessIssue]
    "RNN_RELU": torch._VF.rnn_relu,  # pyright: ignore[reportAttributeAccessIssue]
}


# -- layers of many positions ---------------------------------------------------------------------------------


def layer_batch_dims(layer: nn.Module, inputs: Inputs, outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """Outputs have the batch where `batch_first` says, states and packed outputs in dimension 1.

    Raises where no rule can serve.
    """
    assert isinstance(layer, nn.RNNBase)
    given = inputs.named(layer)["input"]
    packed = isinstance(
        given, PackedSequence
    )  # its gradients come as (T, B, P): see clipping.rules.packed_sequences
    if not packed and (not isinstance(given, Tensor) or given.dim() != 3):
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(
            f"expected a batch of sequences in three dimensions at {type(layer).__name__}; got {shape}, a single "
            "sequence without a batch; call it with unsqueeze(0) (batch_first=True) or unsqueeze(1)"
        )
    if layer.training and layer.dropout > 0 and layer.num_layers > 1:
        raise ValueError(
            f"expected {type(layer).__name__} without dropout between its layers; got dropout={layer.dropout}, whose "
            "masks the rule cannot draw again; stack single layers with nn.Dropout between them, or set its "
            "`dropout` to 0"
        )
    return (0 if layer.batch_first and not packed else 1, 1, 1)[: len(outputs)]


class _Sequences(NamedTuple):
    """The inputs of a level, time first (T, B, D), and the lengths (B,) of the examples where they differ (on the CPU)."""

    values: Tensor
    lengths: Tensor | None

    def reversed(self, values: Tensor) -> Tensor:
        """`values` (T, B, ...) of these sequences, each one's positions in reverse order; padding stays behind."""
        if self.lengths is None:
            return values.flip(0)
        time = torch.arange(values.shape[0], device="cpu").unsqueeze(1)
        place = torch.where(time < self.lengths, self.lengths - 1 - time, time).to(values.device)
        return values.gather(0, place.unsqueeze(2).expand_as(values))

    @property
    def last(self) -> Tensor | None:
        """(B,): the last position of each example where they differ."""
        return None if self.lengths is None else (self.lengths - 1).to(self.values.device)


def _sequences(layer: nn.RNNBase, inputs: Inputs) -> _Sequences:
    given = inputs.named(layer)["input"]
    if isinstance(given, PackedSequence):
        return _Sequences(*pad_packed_sequence(given))
    assert isinstance(given, Tensor)
    return _Sequences(given.transpose(0, 1) if layer.batch_first else given, None)


def _first_states(layer: nn.RNNBase, inputs: Inputs, values: Tensor) -> State:
    """States before the first position, (layers * directions, B, P) and for LSTM (layers * directions, B, H)."""
    given = inputs.named(layer)["hx"]
    if given is not None:
        return (given,) if isinstance(given, Tensor) else tuple(cast(State, given))
    lead = layer.num_layers * (2 if layer.bidirectional else 1), values.shape[1]
    h = values.new_zeros(*lead, layer.proj_size or layer.hidden_size)
    return (h, values.new_zeros(*lead, layer.hidden_size)) if layer.mode == "LSTM" else (h,)


def _run_layer(layer: nn.RNNBase, level: int, sequences: _Sequences, states: State) -> Tensor:
    """(T, B, directions * P): the outputs of one level of the stack, by the fused kernel."""
    suffixes = _suffixes(layer, level)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    found = [Cell(layer, suffix).get(name) for suffix in suffixes for name in names]
    weights = [x.to(sequences.values.dtype) for x in found if x is not None]
    picked = tuple(x[level * len(suffixes) : (level + 1) * len(suffixes)].contiguous() for x in states)
    kernel, setting = _FUSED[layer.mode], (layer.bias, 1, 0.0, False, layer.bidirectional)
    if sequences.lengths is None:
        return kernel(sequences.values, _state(layer, picked), weights, *setting, False)[0]
    packed = pack_padded_sequence(sequences.values, sequences.lengths, enforce_sorted=False)
    assert packed.sorted_indices is not None
    state = _state(layer, tuple(x.index_select(1, packed.sorted_indices) for x in picked))
    return padded(packed, kernel(packed.data, packed.batch_sizes, state, weights, *setting)[0])


def _state(layer: nn.RNNBase, states: State) -> State | Tensor:
    return states if layer.mode == "LSTM" else states[0]


def _suffixes(layer: nn.RNNBase, level: int) -> tuple[str, ...]:
    forward = f"_l{level}"
    return (forward, f"{forward}_reverse") if layer.bidirectional else (forward,)


class _Level(NamedTuple):
    """One level of the stack: its cells, and what each direction saw in its own order of time."""

    cells: tuple[Cell, ...]
    runs: tuple[Run, ...]


def _replayed(layer: nn.RNNBase, sequences: _Sequences, states: State) -> list[_Level]:
    """What each cell of the stack saw, given the stack's inputs (T, B, D)."""
    levels: list[_Level] = []
    for index in range(layer.num_layers):
        outputs = _run_layer(layer, index, sequences, states)
        cells = tuple(Cell(layer, suffix) for suffix in _suffixes(layer, index))
        runs = []
        for direction, part in enumerate(outputs.chunk(len(cells), -1)):
            place, values = index * len(cells) + direction, sequences.values
            if direction:
                part, values = sequences.reversed(part), sequences.reversed(values)
            before = torch.cat((states[0][place].unsqueeze(0).to(part.dtype), part[:-1]))
            first_c = states[1][place] if layer.mode == "LSTM" else None
            runs.append(Run(values, before, first_c, sequences.last))
        levels.append(_Level(cells, tuple(runs)))
        sequences = sequences._replace(values=outputs)
    return levels


def _add_last(grad: Tensor, given: Tensor | None, last: Tensor | None) -> Tensor:
    if given is None:
        return grad
    grad = grad.clone()
    if last is None:
        grad[-1] += given
    else:
        grad[last, torch.arange(len(last), device=last.device)] += given
    return grad


@rule(nn.LSTM, nn.GRU, nn.RNN, parameters=("weight_*", "bias_*"), batch_dims=layer_batch_dims)
def recurrent(layer: nn.Module, inputs: Inputs, grads: Sequence[Tensor | None]) -> dict[str, SampleGrads]:
    """`nn.LSTM`, `nn.GRU`, `nn.RNN`: stacked, bidirectional, projected, packed, with or without a first state."""
    assert isinstance(layer, nn.RNNBase)
    sequences = _sequences(layer, inputs)
    output, *last = grads
    if output is not None and layer.batch_first and sequences.lengths is None:
        output = output.transpose(0, 1)
    with torch.autocast(
        sequences.values.device.type, enabled=False
    ):  # one dtype for the states that a kernel gave back
        values = sequences.values.to(cast(Tensor, layer._parameters["weight_ih_l0"]).dtype)
        states = tuple(x.to(values.dtype) for x in _first_states(layer, inputs, values))
        return _stack_grads(layer, sequences._replace(values=values), states, (output, *last))


def _stack_grads(
    layer: nn.RNNBase, sequences: _Sequences, states: State, grads: Sequence[Tensor | None]
) -> dict[str, SampleGrads]:
    """`grads` are those of the output, time first (T, B, directions * P), and of the last states."""
    levels = _replayed(layer, sequences, states)
    output, last_h, last_c = (*grads, None)[:3]
    if output is None:
        width = (layer.proj_size or layer.hidden_size) * len(levels[0].cells)
        output = sequences.values.new_zeros(*sequences.values.shape[:2], width)
    grad, found = widen(output), {}
    for index, (cells, runs) in reversed(list(enumerate(levels))):
        below = None
        for direction, part in enumerate(grad.chunk(len(cells), -1)):
            place, cell, run = index * len(cells) + direction, cells[direction], runs[direction]
            h, c = (None if x is None else widen(x[place]) for x in (last_h, last_c))
            part = sequences.reversed(part) if direction else part
            steps = BACKWARD[layer.mode](cell, run, _add_last(part, h, run.last), c)
            found.update(collect(cell, run, steps))
            if index > 0:
                sent = steps.from_inputs @ widen(cast(Tensor, cell.get("weight_ih")))
                sent = sequences.reversed(sent) if direction else sent
                below = sent if below is None else below + sent
        grad = grad if below is None else below
    return found


# -- cells of one position ------------------------------------------------------------------------------------


def cell_batch_dims(layer: nn.Module, inputs: Inputs, outputs: Sequence[Tensor]) -> tuple[int, ...]:
    """States (B, H); raises for an input without a batch."""
    if inputs.first.dim() != 2:
        raise ValueError(
            f"expected inputs (B, D) at {type(layer).__name__}; got {tuple(inputs.first.shape)}, one example without "
            "a batch; call it with unsqueeze(0)"
        )
    return batch_first(layer, inputs, outputs)


def _mode(layer: nn.RNNCellBase) -> str:
    activation = getattr(layer, "nonlinearity", "").upper()
    if activation:
        return f"RNN_{activation}"
    return "LSTM" if isinstance(layer, nn.LSTMCell) else "GRU"


@rule(nn.LSTMCell, nn.GRUCell, nn.RNNCell, parameters=("weight_?h", "bias_?h"), batch_dims=cell_batch_dims)
def recurrent_cell(
    layer: nn.Module, inputs: Inputs, grads: Sequence[Tensor | None]
) -> dict[str, SampleGrads]:
    """`nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`."""
    assert isinstance(layer, nn.RNNCellBase)
    first, given = inputs.first, inputs.named(layer)["hx"]
    zero = first.new_zeros(first.shape[0], layer.hidden_size)
    h, c = (
        (zero, zero) if given is None else (given, None) if isinstance(given, Tensor) else cast(State, given)
    )
    grad = zero if grads[0] is None else grads[0]
    cell, run = Cell(layer, ""), Run(first.unsqueeze(0), h.unsqueeze(0), c)
    last_c = grads[1] if len(grads) > 1 else None
    steps = BACKWARD[_mode(layer)](cell, run, grad.unsqueeze(0), last_c)
    return collect(cell, run, steps)
