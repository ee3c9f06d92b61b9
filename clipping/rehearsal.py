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

import copy
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from clipping.errors import MixesExamples
from clipping.hearing import FOLDED, Ear, Key, size_of
from clipping.keeping import Kept, contents, differing
from clipping.random_state import RandomState, Sources
from clipping.structures import flatten, unflatten
from clipping.tape import Tape

BLOCKS, CYCLES = "blocks", "cycles"
"""How the rows of the inputs may lie, where there are several for each example."""

LARGE, SMALL = 1e3, 1e-3
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, nn.Module, type)


class Verdict(NamedTuple):
    """What a rehearsal has shown: the refusal of a forward that mixes the `num_rows` rows, if any.

    `ran` says that the forward ran; `certain` that what came out could be compared.
    """

    refusal: Exception | None
    ran: bool
    certain: bool


class _Plan(NamedTuple):
    """Rows to put in the place of each row, (N,), and which rows stay as they are, (N,)."""

    take: Tensor
    stay: Tensor
    scale: float

    def scales(self) -> Tensor:
        """The factor of each row, (N,)."""
        return torch.where(self.stay, 1.0, self.scale)


class _Run(NamedTuple):
    ear: Ear
    after: RandomState
    kept: dict[str, Any]


class Rehearsal:
    """Runs the model of `tape` on the inputs of one call. `num_examples` own its rows; None: each row is an example."""

    def __init__(self, tape: Tape, args: Any, kwargs: Any, num_examples: int | None) -> None:
        self._tape = tape
        self._model = tape.model
        leaves, self._structure = flatten((args, kwargs))
        self._leaves = [_own(x) for x in leaves]
        self._dims, self.num_rows = _batch(self._leaves, tape.batch_dim)
        self._num_examples = self.num_rows if num_examples is None else num_examples
        self._sources = Sources.of(self._model.modules(), foreign=True)
        self._kept = Kept.of(self._model)
        self._certain = True

    @property
    def possible(self) -> bool:
        """Whether there are several examples, and it is known which rows are theirs."""
        several = self._num_examples > 1 and self.num_rows > 1
        return several and self.num_rows % self._num_examples == 0

    def verdict(self, plans: Sequence[int]) -> Verdict:
        """Rehearse; `plans` are 0 (even examples stay) and 1 (odd ones)."""
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(self._sources.preserved())
            stack.callback(self._kept.put_back)
            stack.enter_context(_disable_current_modes())
            self._before = self._sources.read()
            original = self._attempt(self._leaves)
            if original is None:  # the forward itself will say why
                return Verdict(None, ran=False, certain=False)
            return self._compared(original, plans)

    def _compared(self, original: _Run, plans: Sequence[int]) -> Verdict:
        orders = [BLOCKS] if self.num_rows == self._num_examples else [BLOCKS, CYCLES]
        for which in plans:
            found = [self._tried(original, self._plan(which, order)) for order in orders]
            if all(x is not None for x in found):
                return Verdict(found[0], ran=True, certain=True)
        return Verdict(None, ran=True, certain=self._certain)

    def _plan(self, which: int, order: str) -> _Plan:
        each = torch.arange(self._num_examples)
        partner = torch.where(each % 2 == which, each, each + (1 if which else -1))
        partner = torch.where(partner >= self._num_examples, each - 1, partner)
        times = self.num_rows // self._num_examples
        rows = torch.arange(self.num_rows)
        owners = rows // times if order == BLOCKS else rows % self._num_examples
        inner = rows % times if order == BLOCKS else rows // self._num_examples
        take = (
            partner[owners] * times + inner
            if order == BLOCKS
            else inner * self._num_examples + partner[owners]
        )
        return _Plan(take, owners % 2 == which, SMALL if which else LARGE)

    def _tried(self, original: _Run, plan: _Plan) -> Exception | None:
        run, plan = self._replaced(original, plan, self._dims)
        if run is None:
            self._certain = False
            return None
        odd = _differing(original.ear, run.ear, plan.stay, self._tolerance())
        if odd:
            odd, dims = self._without_coincidences(original, plan, odd)
            if odd:
                if not self._draws_by_rows(original):
                    return self._refusal(original, odd)
                self._certain = False
                return None
            run, plan = self._replaced(original, plan, dims)
        return None if run is None else self._carried(original, run, plan)

    def _replaced(self, original: _Run, plan: _Plan, dims: Sequence[int | None]) -> tuple[_Run | None, _Plan]:
        """A run beside other examples; None where there is none that draws the same random numbers."""
        for scale in (plan.scale, 1.0):
            plan = plan._replace(scale=scale)
            run = self._attempt(self._others(plan, dims), None if scale == 1 else plan.scales())
            if run is not None and run.after.same(original.after):
                return run, plan
        return None, plan

    def _others(self, plan: _Plan, dims: Sequence[int | None]) -> list[object]:
        found: list[object] = []
        for x, dim in zip(self._leaves, dims, strict=True):
            if isinstance(x, Tensor) and dim is not None:
                value = x.detach().index_select(dim, plan.take.to(x.device))
                if value.is_floating_point():
                    shape = [1] * value.dim()
                    shape[dim] = -1
                    value = value * plan.scales().to(value).reshape(shape)
                x = value.requires_grad_(x.requires_grad)
            found.append(x)
        return found

    def _attempt(self, leaves: Sequence[object], scales: Tensor | None = None) -> _Run | None:
        try:
            return self._run(leaves, scales)
        except Exception:  # whatever a model raises on inputs that it did not expect
            return None

    def _run(self, leaves: Sequence[object], scales: Tensor | None = None, *, fresh: bool = True) -> _Run:
        """One run, from what the model held at first, if `fresh`."""
        if fresh:
            self._kept.put_back()
        self._sources.write(self._before)
        args, kwargs = unflatten([_own(x) for x in leaves], self._structure)  # pyright: ignore[reportGeneralTypeIssues]
        ear = Ear(self.num_rows, scales)
        with self._tape.heard(ear):
            outputs = self._model(*args, **kwargs)
            kept = contents(self._model)
            after = self._sources.read()
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
            dims = [d for d, size in enumerate(value.shape) if size in (self.num_rows, self._num_examples)]
            if value.requires_grad and value.is_floating_point() and dims:
                sent = _numbers(value)
                # Where another dimension has as many entries, it is not known which holds the examples.
                if scales is not None and len(dims) == 1 and value.shape[dims[0]] == self.num_rows:
                    shape = [1] * value.dim()
                    shape[dims[0]] = -1
                    sent = sent * scales.to(sent).reshape(shape)
                total.append((value * sent).sum())
        if total and ear.anchor.requires_grad:
            try:
                torch.autograd.grad(
                    torch.stack([x.to(total[0]) for x in total]).sum(), [ear.anchor], allow_unused=True
                )
            except Exception:  # second-order code, reentrant checkpoints: only the forward is compared
                ear.forget_gradients()

    # -- differences ------------------------------------------------------------------------------------------

    def _tolerance(self) -> float:
        kinds = {p.dtype for p in self._model.parameters() if p.is_floating_point()}
        device = next(self._model.parameters()).device.type
        if kinds & {torch.bfloat16, torch.float16} or torch.is_autocast_enabled(device):
            return 2e-2
        if kinds == {torch.float64}:
            return 1e-9
        return 1e-5 if device == "cpu" else 1e-3

    def _without_coincidences(
        self, original: _Run, plan: _Plan, odd: list[Key]
    ) -> tuple[list[Key], list[int | None]]:
        """What differs still where tensors are left alone that have as many entries as there are examples by chance.

        These are told by a run of one example more: without it, an input that holds the examples does not fit.
        """
        dims = self._dims
        longer = self._one_more(dims)
        _, *others = [i for i, dim in enumerate(dims) if dim is not None]
        for i in others:
            without = [None if i == j else dim for j, dim in enumerate(dims)]
            found = self._one_more(without)
            if found is not None:
                dims, longer = without, found
        if dims != self._dims:
            run, plan = self._replaced(original, plan, dims)
            odd = [] if run is None else _differing(original.ear, run.ear, plan.stay, self._tolerance())
        following = odd if longer is None else [key for key in odd if _follows(original.ear, key, longer)]
        self._certain = self._certain and len(following) == len(odd)
        return following, dims

    def _draws_by_rows(self, original: _Run) -> bool:
        """Whether an example decides how many random numbers are drawn: then those of the others are others too."""
        for plan in (self._plan(which, BLOCKS) for which in (0, 1)):
            for scale in (plan.scale, 1.0):
                run = self._attempt(self._others(plan._replace(scale=scale), self._dims))
                if run is not None and not run.after.same(original.after):
                    return True
        return False

    def _one_more(self, dims: Sequence[int | None]) -> dict[Key, tuple[int, ...]] | None:
        """The shapes in a run of one example more; None where that cannot run."""
        times = self.num_rows // self._num_examples
        rows = torch.cat([torch.arange(self.num_rows), torch.arange(times)])
        leaves: list[object] = [
            x.detach().index_select(dim, rows.to(x.device)).requires_grad_(x.requires_grad)
            if isinstance(x, Tensor) and dim is not None
            else x
            for x, dim in zip(self._leaves, dims, strict=True)
        ]
        run = self._attempt(leaves)
        return None if run is None else run.ear.shapes

    def _refusal(self, original: _Run, odd: list[Key]) -> Exception | None:
        again = self._attempt(self._leaves)
        everybody = torch.ones(self.num_rows, dtype=torch.bool)
        moved = [] if again is None else _differing(original.ear, again.ear, everybody, self._tolerance())
        odd = [key for key in odd if key not in moved]
        if moved and (not odd or original.after.generators[0].device.type == "cpu"):
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

    def _carried(self, original: _Run, other: _Run, plan: _Plan) -> Exception | None:
        """Refusal of a forward that depends on what an earlier one kept of its examples."""
        paths = differing(original.kept, other.kept)
        if not paths:
            return None
        scales = None if plan.scale == 1 else plan.scales()
        first, second = self._next(self._leaves, None), self._next(self._others(plan, self._dims), scales)
        everybody = torch.ones(self.num_rows, dtype=torch.bool)
        if first is None or second is None:
            return None
        if not _differing(first.ear, second.ear, everybody, self._tolerance()):
            return None
        return MixesExamples(
            "expected the output or loss of one example to depend on that example alone; got a forward that depends on what "
            f"an earlier one kept of its examples, in {', '.join(map(repr, paths[:4]))}; keep nothing of a batch for later "
            "ones: take statistics from public data before training, or from each example alone"
        )

    def _next(self, leaves: Sequence[object], scales: Tensor | None) -> _Run | None:
        """A run on the batch after one on `leaves`."""
        if self._attempt(leaves, scales) is None:
            return None
        try:
            return self._run(self._leaves, fresh=False)
        except Exception:  # what a model raises on what it kept of such inputs
            return None


def _own(value: object) -> Any:
    """A copy of an input, which the model may change."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return value if isinstance(value, _PLAIN) or callable(value) else copy.deepcopy(value)


def _batch(leaves: Sequence[object], batch_dim: int) -> tuple[list[int | None], int]:
    """Dimension of the rows in each leaf, and their number, as the first tensor tells it."""
    first = next((x for x in leaves if isinstance(x, Tensor) and x.dim() > 0), None)
    if first is None:
        return [None] * len(leaves), 0
    num_rows = first.shape[batch_dim if first.dim() > batch_dim else 0]
    dims: list[int | None] = []
    for x in leaves:
        places = [
            d
            for d in dict.fromkeys((batch_dim, 0))
            if isinstance(x, Tensor) and x.dim() > d and x.shape[d] == num_rows
        ]
        dims.append(places[0] if places else None)
    return dims, num_rows


def _numbers(value: Tensor) -> Tensor:
    """Fixed numbers between 0.5 and 1.5, of either sign."""
    places = torch.arange(1, value.numel() + 1, device=value.device, dtype=torch.float64)
    made = (places * 2**0.5).frac() + 0.5
    return (
        (made * torch.where((places * 3**0.5).frac() < 0.5, -1.0, 1.0)).reshape(value.shape).to(value.dtype)
    )


def _differing(first: Ear, second: Ear, stay: Tensor, tolerance: float) -> list[Key]:
    """The tensors in which the rows that stayed are others, however their rows are read."""
    keys, flags = [], []
    for key, known in first.prints.items():
        other = second.prints.get(key)
        if other is None or other.shape != known.shape:
            continue  # cut to the longest example, say: not comparable
        agree = [
            (_match if reading == FOLDED else _agree)(rows, other.rows[reading], stay, tolerance)
            for reading, rows in known.rows.items()
        ]
        keys.append(key)
        flags.append(torch.stack(agree).any().cpu())
    return (
        [key for key, same in zip(keys, torch.stack(flags).tolist(), strict=True) if not same]
        if flags
        else []
    )


def _agree(first: Tensor, second: Tensor, stay: Tensor, tolerance: float) -> Tensor:
    stay = stay.to(first.device)
    first, second = first[stay], second[stay]
    allowed = tolerance * first[:, :1] + torch.finfo(first.dtype).tiny
    return (
        ((first - second).abs() <= allowed) | ((first == second) | (first.isnan() & second.isnan()))
    ).all()


def _match(first: Tensor, second: Tensor, stay: Tensor, tolerance: float) -> Tensor:
    """Whether as many rows of `first` are among those of `second` as the examples that stay have."""
    place = torch.searchsorted(second[:, 1].sort().values.contiguous(), first[:, 1].contiguous())
    order = second[:, 1].argsort()
    allowed = tolerance * first[:, :1] + torch.finfo(first.dtype).tiny
    found = torch.zeros(len(first), dtype=torch.bool, device=first.device)
    for near in (place.clamp(max=len(second) - 1), (place - 1).clamp(min=0)):
        other = second[order[near]]
        found |= (((first - other).abs() <= allowed) | (first == other)).all(1)
    return found.sum() * len(stay) >= len(first) * stay.sum()


def _follows(ear: Ear, key: Key, shapes: dict[Key, tuple[int, ...]]) -> bool:
    """Whether a dimension in which the rows were looked for grows with the rows."""
    if key not in shapes:
        return True
    known = ear.prints[key]
    return any(size_of(known.shape, x) != size_of(shapes[key], x) for x in known.rows)


def _shown(key: Key) -> str:
    kind, name = key[:2]
    return "an output of the model" if kind == "output" else f"the {kind} of layer {name or 'model'!r}"
