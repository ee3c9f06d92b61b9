# SPDX-License-Identifier: Apache-2.0
"""The sensitive side of one step: clipped sums collected over any number of micro-batches.

The law of this file: a step holds each drawn example at most once, and what a failed backward left behind
never enters it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from clipping import ClippedSum, Clipper, SampleGrads, Tape, add_clipped, refuse_mixed, zero_sum


class StepSum:
    """Collects the clipped gradients of one step from a tape.

    `mean` says that each backward starts from the mean of its examples' losses (else from their sum).
    `num_drawn` is the size of the batch that the sampler drew, None outside a step.
    """

    def __init__(self, model: nn.Module, clipper: Clipper, *, mean: bool, batch_dim: int = 0) -> None:
        self.clipper = clipper
        self.mean = mean
        self.tape = Tape(model, self._collect, batch_dim=batch_dim)
        self.groups = clipper.groups(list(self.tape.parameters))
        self.num_drawn: int | None = None
        self.num_added = 0
        self.hold = False  # more physical batches of this step are to come
        self._totals: dict[str, Tensor] = {}
        self._expected: int | None = None
        self._probing = False

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return self.tape.parameters

    def begin(self, num_drawn: int) -> None:
        """Start a step on a batch of `num_drawn` examples."""
        if self.num_added > 0:
            raise RuntimeError(
                "expected the last batch to be released before the next one; got one whose gradients are pending; "
                "release each batch by itself (two independent draws in one step are not one Poisson draw), or "
                "call discard() to give it up"
            )
        self.num_drawn = num_drawn

    def discard(self) -> None:
        """Forget what was collected; nothing of it was released."""
        self._totals = {}
        self.num_added = 0

    def end(self) -> None:
        """Leave the step."""
        self.discard()
        self.num_drawn = None

    def add(self, losses: Tensor) -> None:
        """Run the backward of per-example `losses` (B,) and collect the clipped gradients."""
        self._expected = losses.shape[0]
        try:
            losses.sum().backward()
        finally:
            self._expected = None

    def probe(self, losses: Tensor) -> None:
        """Refuse losses in which one example reaches another; the graph stays usable. Needs B >= 2."""
        self._probing = True
        try:
            losses[-1].backward(retain_graph=True)
        finally:
            self._probing = False

    def clipped(self) -> ClippedSum:
        """The clipped sum of the step, handed over: parameters that no example reached are zero."""
        totals, self._totals = self._totals, {}
        missing = {name: p for name, p in self.parameters.items() if name not in totals}
        zeros = zero_sum(missing, self.clipper.sensitivity).total
        return ClippedSum({**totals, **zeros}, self.clipper.sensitivity)

    def _collect(self, found: dict[str, SampleGrads], num_examples: int) -> None:
        if self._probing:
            refuse_mixed(found, num_examples - 1, "loss")
            return
        if self._expected is not None and num_examples != self._expected:
            raise ValueError(
                f"expected losses for the examples that the model saw; got {self._expected} losses and "
                f"{num_examples} examples; compute one loss for each row of the batch"
            )
        self._count(num_examples)
        scale = float(num_examples) if self.mean else 1.0
        # A failure half-way would leave some parameters of these examples in the totals.
        try:
            add_clipped(
                self._totals, found, num_examples, clipper=self.clipper, groups=self.groups, scale=scale
            )
        except BaseException:
            self.discard()
            raise

    def _count(self, num_examples: int) -> None:
        if self.num_drawn is None:
            raise RuntimeError(
                "expected a backward on a batch that the private sampler drew; got one outside a step; take the "
                "examples from batches(...) or from the private data loader, and use torch.no_grad() elsewhere"
            )
        if self.num_added + num_examples > self.num_drawn:
            raise RuntimeError(
                f"expected each drawn example once per step ({self.num_drawn} drawn); got "
                f"{self.num_added + num_examples}, which would break the sensitivity; after a failed or repeated "
                "backward call discard() and run the whole batch again"
            )
        self.num_added += num_examples


def persistent_buffers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Identity and version of each buffer that `state_dict` would publish."""
    saved = set(model.state_dict(keep_vars=True))
    named = model.named_buffers()
    return {name: (id(buffer), buffer._version) for name, buffer in named if name in saved}


def refuse_changed_buffers(before: dict[str, tuple[int, int]], model: nn.Module) -> None:
    """Raise RuntimeError where a buffer that would be published changed since `before`: it was never noised."""
    now = persistent_buffers(model)
    changed = sorted(name for name in now if before.get(name) != now[name])
    if changed:
        raise RuntimeError(
            f"expected buffers that do not change in training; got changes in {changed[:4]}, which would be "
            "published without noise; freeze the module that writes them (eval()), or register them with "
            "persistent=False"
        )


def write_gradients(
    parameters: dict[str, nn.Parameter], released: dict[str, Tensor], expected_batch_size: float
) -> None:
    """Set each parameter's `.grad` to the released sum divided by a public constant, in the parameter's dtype."""
    for name, parameter in parameters.items():
        parameter.grad = released[name].div_(expected_batch_size).to(parameter.dtype)


def clear_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Set every `.grad` to None."""
    for parameter in parameters:
        parameter.grad = None


def refuse_changed_parameters(parameters: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Raise RuntimeError where the trainable parameters are no longer those that were made private."""
    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    odd = [name for name in {*now, *parameters} if now.get(name) is not parameters.get(name)]
    if odd:
        raise RuntimeError(
            f"expected the trainable parameters that were made private; got changes at {sorted(odd)[:4]}; freeze, "
            "unfreeze, add adapters and move the model to its device before making it private"
        )


def refuse_distributed() -> None:
    """Raise RuntimeError in a process group: ranks would draw and noise on their own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise RuntimeError(
                "expected a single process; got an initialised process group of "
                f"{torch.distributed.get_world_size()}; distributed private steps are not supported yet"
            )
