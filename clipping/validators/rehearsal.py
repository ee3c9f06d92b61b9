# SPDX-License-Identifier: Apache-2.0
"""A forward and its backward, rehearsed with other examples beside some that stay: for these, nothing may change.

What is clipped of an example is made of the inputs of layers and of the gradients of their outputs, in its own rows.
The batch is run as it is; then with every other example replaced by its neighbour (and its numbers, where they are real,
1,000 times as large), and with the others replaced (1,000 times as small); the rows that stayed are compared. Whatever
brings examples together is seen, with or without a gradient: statistics, branches of Python on numbers of the batch, hooks
inside the forward, custom functions. What the model holds afterwards is compared too: where it depends on the examples,
the next forward must not depend on it.

Everything is left as it was: attributes, buffers, random generators, the inputs.

Shapes: N rows, B examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from clipping.errors import MixesExamples
from clipping.modules.heard_calls import Ear, Key, disagreeing, follows
from clipping.recording.tape import Tape
from clipping.reruns.kept_state import Kept, contents, differing
from clipping.reruns.nested_values import flatten
from clipping.reruns.random_state import RandomState, Sources
from clipping.validators.replaced_examples import Dims, Inputs, Plan, along


class Verdict(NamedTuple):
    """What a rehearsal has shown: the refusal of a forward that mixes the `num_rows` rows, if any.

    `ran` says that the forward ran; `certain` that what came out could be compared.
    """

    refusal: Exception | None
    ran: bool
    certain: bool


class _Run(NamedTuple):
    ear: Ear
    after: RandomState
    kept: dict[str, Any]


class Rehearsal:
    """Runs the model of `tape` on the inputs of one call. `num_examples` own its rows; None: each row is an example."""

    def __init__(self, tape: Tape, args: Any, kwargs: Any, num_examples: int | None, turn: int = 0) -> None:
        self._tape = tape
        self._model = tape.model
        self._inputs = Inputs.of(args, kwargs, tape.batch_dim, num_examples, turn)
        self._sources = Sources.of(self._model.modules(), foreign=True)
        self._kept = Kept.of(self._model)
        self._certain = True

    @property
    def num_rows(self) -> int:
        """N."""
        return self._inputs.num_rows

    @property
    def possible(self) -> bool:
        """Whether there are several examples, and it is known which rows are theirs."""
        return self._inputs.several

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with warnings.catch_warnings(), self._sources.preserved(), _disable_current_modes():
            warnings.simplefilter("ignore")
            self._before = self._sources.read()
            try:
                yield
            finally:
                self._kept.put_back()

    def failure(self) -> Exception | None:
        """What the forward raises on these inputs."""
        with self._undisturbed():
            try:
                self._run(self._inputs.leaves)
            except Exception as error:  # whatever a model raises
                return error
        return None

    def verdict(self, plans: Sequence[int]) -> Verdict:
        """Rehearse; `plans` are 0 (even examples stay) and 1 (odd ones)."""
        with self._undisturbed():
            original = self._attempt(self._inputs.leaves)
            if original is None:  # the forward itself will say why
                return Verdict(None, ran=False, certain=False)
            for which in plans:
                found = [self._tried(original, self._inputs.plan(which, x)) for x in self._inputs.orders]
                if all(x is not None for x in found):
                    return Verdict(found[0], ran=True, certain=True)
            return Verdict(None, ran=True, certain=self._certain)

    def _tried(self, original: _Run, plan: Plan) -> Exception | None:
        """What the rows that stay in `plan` tell."""
        dims = self._inputs.dims
        run, used = self._replaced(original, plan, dims)
        if run is None:
            self._certain = False
            return None
        if self._odd(original, run, plan.stay):
            plan, dims = self._without_coincidences(plan)
            run, used = self._replaced(original, plan, dims)
            odd = [] if run is None else self._odd(original, run, plan.stay)
            following = [key for key in odd if not plan.longer or follows(original.ear, key, plan.longer)]
            self._certain = self._certain and len(following) == len(odd)
            if following and not self._draws_by_rows(original):
                return self._refusal(original, following)
            self._certain = self._certain and not following
            if following:
                return None
        return None if run is None else self._carried(original, run, used, dims)

    def _odd(self, first: _Run, second: _Run, stay: Tensor) -> list[Key]:
        return disagreeing(first.ear, second.ear, stay, self._tolerance())

    # -- runs ---------------------------------------------------------------------------------------------------

    def _replaced(self, original: _Run, plan: Plan, dims: Dims) -> tuple[_Run | None, Plan]:
        """A run beside other examples; None where there is none that draws the same random numbers."""
        for scale in (plan.scale, 1.0):
            plan = plan._replace(scale=scale)
            run = self._attempt(self._inputs.others(plan, dims), plan)
            if run is not None and run.after.same(original.after):
                return run, plan
        return None, plan

    def _attempt(self, leaves: Sequence[object], plan: Plan | None = None) -> _Run | None:
        """A run from what the model held at first."""
        self._kept.put_back()
        try:
            return self._run(leaves, plan)
        except Exception:  # whatever a model raises on inputs that it did not expect
            return None

    def _run(self, leaves: Sequence[object], plan: Plan | None = None) -> _Run:
        self._sources.write(self._before)
        args, kwargs = self._inputs.arguments(leaves)
        scales = None if plan is None or plan.scale == 1 else plan.scales()
        ear = Ear(self.num_rows, scales, None if plan is None else plan.longer)
        with self._tape.heard(ear):
            outputs = self._model(*args, **kwargs)
            kept, after = contents(self._model), self._sources.read()
            self._send_back(ear, outputs, scales)
        torch.clear_autocast_cache()
        return _Run(ear, after, kept)

    def _send_back(self, ear: Ear, outputs: object, scales: Tensor | None) -> None:
        """Note the outputs, and the gradients that layers get of fixed numbers times these."""
        total: list[Tensor] = []
        for place, value in enumerate(flatten(outputs)[0]):
            if not isinstance(value, Tensor):
                continue
            ear.note(("output", "", 0, place), value)
            sizes = (self.num_rows, self._inputs.num_examples)
            dims = [d for d, size in enumerate(value.shape) if size in sizes]
            if value.requires_grad and value.is_floating_point() and dims:
                sent = _numbers(value)
                # Where another dimension has as many entries, it is not known which holds the examples.
                if scales is not None and len(dims) == 1 and value.shape[dims[0]] == self.num_rows:
                    sent = sent * along(scales.to(sent), value, dims[0])
                total.append((value * sent).sum())
        if not total:
            return
        summed = torch.stack([x.to(total[0]) for x in total]).sum()
        try:
            torch.autograd.grad(summed, [ear.anchor], allow_unused=True)
        except Exception:  # second-order code, reentrant checkpoints: only the forward is compared
            ear.forget_gradients()

    # -- differences ------------------------------------------------------------------------------------------

    def _tolerance(self) -> float:
        kinds = {p.dtype for p in self._model.parameters() if p.is_floating_point()}
        if kinds & {torch.bfloat16, torch.float16} or torch.is_autocast_enabled(self._device):
            return 2e-2
        if kinds == {torch.float64}:
            return 1e-9
        return 1e-5 if self._device == "cpu" else 1e-3

    @property
    def _device(self) -> str:
        return next(self._model.parameters()).device.type

    def _without_coincidences(self, plan: Plan) -> tuple[Plan, Dims]:
        """`plan` without tensors that have as many entries as there are examples by chance.

        These are told by a run of one example more: without it, an input that holds the examples does not fit.
        """
        dims = list(self._inputs.dims)
        run = self._attempt(self._inputs.one_more(dims))
        _, *others = [i for i, dim in enumerate(dims) if dim is not None]
        for i in others:
            without = [None if i == j else dim for j, dim in enumerate(dims)]
            found = self._attempt(self._inputs.one_more(without))
            if found is not None:
                dims, run = without, found
        return plan._replace(longer={} if run is None else run.ear.shapes), dims

    def _draws_by_rows(self, original: _Run) -> bool:
        """Whether an example decides how many random numbers are drawn: then those of the others are others too."""
        for plan in (self._inputs.plan(which, self._inputs.orders[0]) for which in (0, 1)):
            for scale in (plan.scale, 1.0):
                leaves = self._inputs.others(plan._replace(scale=scale), self._inputs.dims)
                run = self._attempt(leaves)
                if run is not None and not run.after.same(original.after):
                    return True
        return False

    def _refusal(self, original: _Run, odd: list[Key]) -> Exception:
        again = self._attempt(self._inputs.leaves)
        everybody = torch.ones(self.num_rows, dtype=torch.bool, device="cpu")
        moved = [] if again is None else self._odd(original, again, everybody)
        odd = [key for key in odd if key not in moved]
        if moved and (not odd or self._device == "cpu"):  # elsewhere the order of additions may vary
            return RuntimeError(
                "expected the model's forward to give the same outputs when it runs again from the same state and the same "
                f"random numbers; got others at {_shown(moved[0])}, so that it cannot be seen whether it keeps examples apart; "
                "draw random numbers with torch's generators, and keep nothing of a batch in globals or closures"
            )
        return MixesExamples(
            "expected the output or loss of one example to depend on that example alone; got other numbers for an example, "
            f"at {_shown(odd[0])}, when the examples beside it were replaced; look for statistics of the batch (maximum, norm, "
            "mean, top-k), branches on them and sizes of selections; take each from one example (dim=-1 in place of all), or "
            "from public numbers"
        )

    # -- from batch to batch ------------------------------------------------------------------------------------

    def _carried(self, original: _Run, other: _Run, plan: Plan, dims: Dims) -> Exception | None:
        """Refusal of a forward that depends on what an earlier one kept of its examples."""
        paths = differing(original.kept, other.kept)
        if not paths:
            return None
        first = self._next(self._inputs.leaves, None)
        second = self._next(self._inputs.others(plan, dims), plan)
        everybody = torch.ones(self.num_rows, dtype=torch.bool, device="cpu")
        if first is None or second is None or not self._odd(first, second, everybody):
            return None
        return MixesExamples(
            "expected the output or loss of one example to depend on that example alone; got a forward that depends on what "
            f"an earlier one kept of its examples, in {', '.join(map(repr, paths[:4]))}; keep nothing of a batch for later "
            "ones: take statistics from public data before training, or from each example alone"
        )

    def _next(self, leaves: Sequence[object], plan: Plan | None) -> _Run | None:
        """A run on the batch after one on `leaves`."""
        if self._attempt(leaves, plan) is None:
            return None
        try:
            return self._run(self._inputs.leaves)
        except Exception:  # what a model raises on what it kept of such inputs
            return None


def _numbers(value: Tensor) -> Tensor:
    """Fixed numbers between 0.5 and 1.5, of either sign."""
    places = torch.arange(1, value.numel() + 1, device=value.device, dtype=torch.float64)
    made = (places * 2**0.5).frac() + 0.5
    return (
        (made * torch.where((places * 3**0.5).frac() < 0.5, -1.0, 1.0)).reshape(value.shape).to(value.dtype)
    )


def _shown(key: Key) -> str:
    kind, name = key[:2]
    return "an output of the model" if kind == "output" else f"the {kind} of layer {name or 'model'!r}"
