# SPDX-License-Identifier: Apache-2.0
"""Clipping by groups: a partition of the parameters, and for each part the clipper of its own norm.

The law of this file: the groups of a clipper hold each trainable parameter exactly once, so that the squares of
their sensitivities add up. What a group is and how it is clipped are chosen apart: each partition below takes a
`rule`, which makes a clipper of one group from its clip norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from clipping.clippers.clipper import Clipper, check_clip_norm
from clipping.clippers.whole_gradient import FlatClipper

ClipRule = Callable[[float], Clipper]
"""Clip norm -> a clipper of a single group."""

_ADAPTER = ".lora_"


@dataclass(frozen=True, slots=True)
class GroupClipper:
    """Clips each group of parameters by its own norm: per layer, per block, per adapter or per parameter.

    `clippers[k]` is a clipper of a single group, and clips the parameters `members[k]`.

    Guarantees
    ----------
    Sensitivity is sqrt(sum_k clippers[k].sensitivity^2), since the groups partition the coordinates of the
    gradient. Source: McMahan et al. (2018), arXiv:1710.06963, section 2 (per-layer clipping).
    """

    members: tuple[tuple[str, ...], ...]
    clippers: tuple[Clipper, ...]

    def __post_init__(self) -> None:
        if len(self.members) != len(self.clippers):
            raise ValueError(
                f"expected one clip norm per group, {len(self.members)} of them; got {len(self.clippers)}; "
                "give the list in the order of the groups"
            )
        nested = [clipper for clipper in self.clippers if len(clipper.clip_norms) != 1]
        if nested:
            raise ValueError(
                f"expected a clipper of a single group for each group; got a {type(nested[0]).__name__} of "
                f"{len(nested[0].clip_norms)}; list its groups beside the others"
            )

    @property
    def sensitivity(self) -> float:
        """sqrt(sum_k clippers[k].sensitivity^2)."""
        return math.hypot(*self.clip_norms)

    @property
    def clip_norms(self) -> tuple[float, ...]:
        """The sensitivity of each group's clipper."""
        return tuple(clipper.sensitivity for clipper in self.clippers)

    def groups(self, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """The groups given, after checking that they partition `names`."""
        listed = [name for group in self.members for name in group]
        if sorted(listed) != sorted(names):
            odd = sorted(set(listed) ^ set(names)) or sorted({n for n in listed if listed.count(n) > 1})
            raise ValueError(
                f"expected groups that hold each trainable parameter once; got a difference at {odd[:5]}; "
                "build the clipper with per_layer(model, ...) or per_parameter(model, ...) after freezing"
            )
        return self.members

    def weights(self, norms: Tensor, group: int) -> Tensor:
        """(B,) norms within a group to (B,) weights; an example that is not finite there is dropped there."""
        return self.clippers[group].weights(norms, 0)


def per_layer(model: nn.Module, clip_norm: float, *, rule: ClipRule = FlatClipper) -> GroupClipper:
    """One group per layer and equal shares, of total sensitivity `clip_norm`."""
    return _shared(_gathered((name, _layer(name)) for name in _trainable(model)), clip_norm, rule)


def per_parameter(
    model: nn.Module, clip_norms: Sequence[float], *, rule: ClipRule = FlatClipper
) -> GroupClipper:
    """One group per trainable parameter, with these clip norms in the order of `named_parameters()`."""
    members = tuple((name,) for name in _trainable(model))
    return GroupClipper(members, tuple(rule(_checked(clip_norm)) for clip_norm in clip_norms))


def per_block(
    model: nn.Module, clip_norm: float, *, blocks: str | None = None, rule: ClipRule = FlatClipper
) -> GroupClipper:
    """One group per block, one of what comes before the blocks and one of what comes after: equal shares.

    `blocks` names the list of blocks in the model, "transformer.h" say; by default, the largest `nn.ModuleList`
    or `nn.Sequential` whose members are all of one type. The total sensitivity is `clip_norm`. Before and after
    go by the order of `named_parameters()`, in which a tied parameter stands at its first name.
    """
    names = _trainable(model)
    prefix = _largest_list(model) if blocks is None else _named_list(model, blocks)
    inside = [index for index, name in enumerate(names) if name.startswith(prefix)]
    if not inside:
        raise ValueError(
            f"expected blocks with trainable parameters; got {blocks!r}, which holds none; name another list with "
            "blocks=, or clip per_layer"
        )
    groups: dict[str, str] = {}
    for index, name in enumerate(names):
        member = name.removeprefix(prefix).partition(".")[0]
        outside = "after" if index > inside[-1] else "before"
        groups[name] = f"{prefix}{member}." if name.startswith(prefix) else outside
    return _shared(_gathered(groups.items()), clip_norm, rule)


def per_adapter(model: nn.Module, clip_norm: float, *, rule: ClipRule = FlatClipper) -> GroupClipper:
    """One group per layer with a LoRA adapter (its A, its B, its magnitudes), one per other layer: equal shares.

    The total sensitivity is `clip_norm`.
    """
    names = _trainable(model)
    if not any(_ADAPTER in name for name in names):
        raise ValueError(
            "expected a model with trainable LoRA adapters; got none; add them with peft.get_peft_model before, "
            "or clip per_layer or per_block"
        )
    keyed = ((n, n.partition(_ADAPTER)[0] if _ADAPTER in n else _layer(n)) for n in names)
    return _shared(_gathered(keyed), clip_norm, rule)


def by_component(
    model: nn.Module, clip_norms: Mapping[str, float], *, rule: ClipRule = FlatClipper
) -> GroupClipper:
    """One group per pattern of parameter names, with its own clip norm: `{"*.lora_A.*": 0.1, "*.lora_B.*": 1}`.

    Patterns are those of a shell (`fnmatch`); each trainable parameter matches exactly one of them.
    """
    names = _trainable(model)
    found = {name: [p for p in clip_norms if fnmatchcase(name, p)] for name in names}
    odd = [name for name, patterns in found.items() if len(patterns) != 1]
    if odd:
        raise ValueError(
            f"expected patterns of which each trainable parameter matches exactly one; got {odd[0]!r}, which matches "
            f"{found[odd[0]] or 'none'} ({len(odd)} such parameters); narrow the patterns or add one"
        )
    members = _gathered((name, patterns[0]) for name, patterns in found.items())
    unused = sorted(set(clip_norms) - set(members))
    if unused:
        raise ValueError(
            f"expected patterns that each match a trainable parameter; got {unused}, which match none; correct "
            "them, or leave them out"
        )
    return GroupClipper(tuple(members.values()), tuple(rule(_checked(clip_norms[p])) for p in members))


def _checked(clip_norm: float) -> float:
    check_clip_norm(clip_norm)  # before float() makes a number of True
    return float(clip_norm)


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _gathered(keyed: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for name, key in keyed:
        groups.setdefault(key, []).append(name)
    return {key: tuple(names) for key, names in groups.items()}


def _shared(groups: dict[str, tuple[str, ...]], clip_norm: float, rule: ClipRule) -> GroupClipper:
    check_clip_norm(clip_norm)
    share = clip_norm / math.sqrt(max(1, len(groups)))
    return GroupClipper(tuple(groups.values()), tuple(rule(share) for _ in groups))


def _largest_list(model: nn.Module) -> str:
    sizes = {
        name: sum(p.numel() for p in module.parameters() if p.requires_grad)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(member) for member in module}) == 1
    }
    name = max(sizes, key=lambda name: sizes[name], default=None)
    if name is None or sizes[name] == 0:
        raise ValueError(
            "expected a model with an nn.ModuleList or nn.Sequential of trainable blocks of one type; got none; name "
            "the list of blocks with blocks=, or clip per_layer"
        )
    return f"{name}." if name else ""


def _named_list(model: nn.Module, blocks: str) -> str:
    if not isinstance(dict(model.named_modules()).get(blocks), nn.ModuleList | nn.Sequential):
        lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
        raise ValueError(
            f"expected the name of an nn.ModuleList or nn.Sequential of blocks; got {blocks!r}; this model has "
            f"{lists[:8]}"
        )
    return f"{blocks}." if blocks else ""
