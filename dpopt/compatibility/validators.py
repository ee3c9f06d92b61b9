# SPDX-License-Identifier: Apache-2.0
"""Which modules cannot be trained privately, and a model in which others stand in their place."""

from __future__ import annotations

import copy
import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from clipping import MixesExamples
from clipping.validators.examine import examine, listed_faults


class ModuleValidator:
    """Names modules that mix examples, and replaces BatchNorm, with the names that Opacus has.

    LSTM, GRU, RNN and MultiheadAttention of torch are trained as they are: nothing replaces them.
    """

    @staticmethod
    def validate(module: nn.Module, *, strict: bool = False) -> list[MixesExamples]:
        """An error for each module that cannot be trained privately, with its remedy; none where `module` is fine.

        Args:
            module: the model.
            strict: raise them in place of returning them.

        Raises:
            MixesExamples: `strict`, and there is one.
            ValueError: `strict`, and nothing is trainable.
        """
        if strict:
            examine(module)
        return [MixesExamples(fault) for fault in listed_faults(module)]

    @staticmethod
    def is_valid(module: nn.Module) -> bool:
        """Whether `validate` has nothing to say."""
        return not listed_faults(module)

    @staticmethod
    def fix(
        module: nn.Module, *, replace_bn_with_in: bool = False, num_groups: int | None = None
    ) -> nn.Module:
        """A deep copy in which other normalisations stand for those that use the whole batch.

        BatchNorm becomes GroupNorm, of `num_groups` groups (default: the greatest common divisor of 32 and the number of
        channels, as in Opacus), with fresh weights; or, with `replace_bn_with_in`, InstanceNorm. InstanceNorm with
        running statistics goes on without them. A BatchNorm whose own parameters are frozen stays, for `eval()`. Make
        the optimizer from the copy's parameters.

        Raises:
            ValueError: both are given, or channels that the groups do not divide.
        """
        if replace_bn_with_in and num_groups is not None:
            raise ValueError(
                "expected replace_bn_with_in or num_groups; got both; leave one out: InstanceNorm has no groups"
            )
        fixed = copy.deepcopy(module)
        known: dict[int, nn.Module] = {}
        for parent in tuple(fixed.modules()):
            for name, child in tuple(parent.named_children()):
                known.setdefault(id(child), _instead(child, replace_bn_with_in, num_groups))
                if known[id(child)] is not child:
                    setattr(parent, name, known[id(child)])
        return _instead(fixed, replace_bn_with_in, num_groups)

    @staticmethod
    def fix_and_validate(
        module: nn.Module, *, replace_bn_with_in: bool = False, num_groups: int | None = None
    ) -> nn.Module:
        """`fix`, and then `validate` strictly.

        Raises:
            MixesExamples: something is left that no replacement is known for.
        """
        fixed = ModuleValidator.fix(module, replace_bn_with_in=replace_bn_with_in, num_groups=num_groups)
        ModuleValidator.validate(fixed, strict=True)
        return fixed


def _instead(module: nn.Module, instance: bool, num_groups: int | None) -> nn.Module:
    """What stands for `module`; itself where it may stay."""
    if isinstance(module, _BatchNorm):
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            return module
        return _placed(_normalised(module, instance, num_groups), module)
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        kind = type(module)
        found = kind(module.num_features, module.eps, module.momentum or 0.1, affine=module.affine)
        found.load_state_dict({n: p for n, p in module.named_parameters()})
        return _placed(found, module)
    return module


def _normalised(module: _BatchNorm, instance: bool, num_groups: int | None) -> nn.Module:
    if not instance:
        groups = math.gcd(32, module.num_features) if num_groups is None else num_groups
        return nn.GroupNorm(groups, module.num_features, affine=module.affine)
    kinds = {
        nn.BatchNorm1d: nn.InstanceNorm1d,
        nn.BatchNorm2d: nn.InstanceNorm2d,
        nn.BatchNorm3d: nn.InstanceNorm3d,
    }
    kind = next((kinds[base] for base in type(module).__mro__ if base in kinds), None)
    if kind is None:
        raise ValueError(
            f"expected BatchNorm1d, 2d or 3d to replace by InstanceNorm; got {type(module).__name__}, which may have any "
            "number of dimensions; leave replace_bn_with_in out for GroupNorm"
        )
    return kind(module.num_features, affine=module.affine)


def _placed(found: nn.Module, old: nn.Module) -> nn.Module:
    """`found`, on the device, in the dtype and in the mode of `old`."""
    tensors = [
        *old.parameters(recurse=False),
        *(b for b in old.buffers(recurse=False) if b.is_floating_point()),
    ]
    found.train(old.training)
    for own, given in zip(found.parameters(), old.parameters(recurse=False), strict=False):
        own.requires_grad_(given.requires_grad)
    return found.to(tensors[0].device, tensors[0].dtype) if tensors else found
