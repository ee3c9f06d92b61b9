# SPDX-License-Identifier: Apache-2.0
"""When the model's forward is rehearsed with other examples: on the first batches of a run, and now and then later.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from clipping.recording.tape import Tape
from clipping.reruns.nested_values import flatten
from clipping.validators.rehearsal import Rehearsal

MOST_SIZES = 16
"""Sizes of graph, for one kind of call, at which everything is looked at again."""


class Rehearsing:
    """Rehearses each kind of call of the model at draws 1, 2, 4, 8, ..., and where its graph has another size than before.

    A kind of call has its own arguments, numbers of dimensions and mode of training. Draws whose batch is of one row show
    nothing, and leave it to the next. `part` tells the size of the part handed out last, 0 where that is not known,
    or None outside a step; where it is not known, what was found is told to `require`. `changed` is called where a
    graph has another size.
    """

    def __init__(self, tape: Tape, part: Callable[[], int | None], changed: Callable[[], None]) -> None:
        self.num_draws = self.num_rehearsals = 0
        self._tape = tape
        self._home = id(tape.model)
        self._part = part
        self._changed = changed
        self._due = 1
        self._known: set[Hashable] = set()
        self._certain: set[Hashable] = set()
        self._sizes: dict[Hashable, set[int]] = {}
        self._found: dict[int, Exception] = {}
        self._begun: tuple[Hashable, int] | None = None
        self._versions: list[tuple[nn.Parameter, int]] = []
        self._frozen: list[int] | None = None
        self._rehearsed_at: dict[Hashable, int] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Rehearsing:
        """Itself: a copied model is an ordinary model, whose copied hooks know that they are not at home."""
        return self

    def begin(self) -> None:
        """A batch was drawn."""
        self.num_draws += 1
        self._found.clear()
        if self.num_draws >= self._due:
            self._due = 2 * self.num_draws
            self._known.clear()

    def require(self, num_examples: int) -> None:
        """Losses of so many examples came: raise MixesExamples where their rows were seen to be mixed."""
        # Calls of fewer rows are of parts of these examples.
        found = next((x for rows, x in self._found.items() if rows <= num_examples), None)
        self._found.clear()
        if found is not None:
            raise found

    def holds(self) -> bool:
        """Whether a forward like the one that runs was rehearsed, and nothing was found."""
        return self._begun is not None and self._begun[0] in self._certain and not self._found

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model, before all others."""
        self._begun = None
        if not self._here(model):
            return
        kind = _kind(model, args, kwargs)
        due = kind not in self._known
        self._frozen = _fingerprint(model) if due else None
        if due:
            self._rehearse(kind, args, kwargs)
        self._begun = kind, _nodes_made()
        self._versions = [(p, _version(p)) for p in model.parameters()]

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: object) -> None:
        """Forward hook of the model: look again where more or fewer operations were recorded than ever before."""
        begun, self._begun = self._begun, None
        if begun is None or not self._here(model):
            return
        written = any(_version(p) != version for p, version in self._versions)
        if written or self._frozen not in (None, _fingerprint(model)):
            raise RuntimeError(
                "expected a forward that leaves parameters as they are; got one that writes to them, which would be published "
                "without noise; move such statistics out of the private loop, and moving averages of weights to after step()"
            )
        kind, number = begun
        size = _nodes_made() - number
        sizes = self._sizes.setdefault(kind, set())
        if size in sizes or len(sizes) >= MOST_SIZES:
            return
        sizes.add(size)
        if len(sizes) > 1:
            self._changed()
            if self._rehearsed_at.get(kind) != self.num_draws:
                self._rehearse(kind, args, kwargs)

    def _refuse_single(self, kind: Hashable, rehearsal: Rehearsal) -> None:
        """Raise ValueError where torch does not run a normalisation on one example alone."""
        if (kind, 1) in self._known or not any(
            isinstance(x, _OF_SEVERAL) for x in self._tape.model.modules()
        ):
            return
        self._known.add((kind, 1))
        error = rehearsal.failure()
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            raise ValueError(
                "expected a model that runs on one example alone, as what is drawn by chance may be of one or of none; got a "
                "normalisation over a single value, which torch refuses; give each group of GroupNorm several channels "
                "(num_groups below num_channels), or use LayerNorm"
            ) from error

    def _here(self, model: nn.Module) -> bool:
        ready = self._part() is not None and id(model) == self._home
        ready = ready and not self._tape.is_paused and not self._tape.is_rerunning
        ready = ready and torch._C._current_graph_task_id() == -1
        return ready and torch.is_grad_enabled()

    def _rehearse(self, kind: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            rehearsal = Rehearsal(self._tape, args, kwargs, self._part() or None, self.num_rehearsals)
        except Exception:  # an argument that cannot be copied
            return
        if rehearsal.num_rows == 1 and self._part() == 1:
            return self._refuse_single(kind, rehearsal)
        if not rehearsal.possible:
            return
        self.num_rehearsals += 1
        # Later ones take turns, and cost less.
        plans = (0, 1) if self.num_draws < 4 else (self.num_rehearsals // 2 % 2,)
        verdict = rehearsal.verdict(plans)
        if verdict.refusal is not None:
            if self._part():
                raise verdict.refusal
            self._found.setdefault(rehearsal.num_rows, verdict.refusal)
        if verdict.ran:
            self._known.add(kind)
            self._rehearsed_at[kind] = self.num_draws
        if verdict.certain:
            self._certain.add(kind)
        else:
            self._certain.discard(kind)


_OF_SEVERAL = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
"""Modules that torch may refuse to run on one row: it counts the values of all rows."""


def _nodes_made() -> int:
    """How many nodes of graphs this thread has made."""
    return torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]


def _kind(model: nn.Module, args: Any, kwargs: Any) -> Hashable:
    leaves, structure = flatten((args, kwargs))
    return str(structure.spec), model.training, *map(_of_leaf, leaves)


def _of_leaf(value: object) -> Hashable:
    return (value.dim(), value.dtype, value.requires_grad) if isinstance(value, Tensor) else type(value)


def _version(parameter: nn.Parameter) -> int:
    """How often it was written to, where torch counts that."""
    return 0 if parameter.is_inference() else parameter._version


def _fingerprint(model: nn.Module) -> list[int]:
    """Numbers that change with the frozen parameters, also where `.data` is written, which torch does not count."""
    frozen = [p.detach() for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    told = [x for p in frozen if p.numel() for x in (p.sum(dtype=torch.float64), p.norm(dtype=torch.float64))]
    # In one transfer; as bits, since NaN is itself.
    return torch.stack([x.to(told[0].device) for x in told]).view(torch.int64).tolist() if told else []
