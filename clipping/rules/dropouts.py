# SPDX-License-Identifier: Apache-2.0
"""Layers with a rule that draw masks of their own inside, which a rule cannot draw again: the generic rule serves them.

Only where the masks are drawn by operations that can be seen: fused kernels of accelerators draw unseen.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def _drops(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1


def _on_cpu(module: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in module.parameters())


def draws_masks(module: nn.Module) -> bool:
    """Whether `module` is such a layer, and draws now where it can be seen."""
    return _drops(module) and _on_cpu(module)


def draws_unseen(modules: Iterable[nn.Module]) -> bool:
    """Whether a layer among `modules` draws masks inside a fused kernel, whose generator nobody else sees."""
    return any(isinstance(x, nn.RNNBase) and _drops(x) and not _on_cpu(x) for x in modules)


def layer_batch_dim(module: nn.Module) -> int | None:
    """Where such a layer defines its batch, whatever the model around it does; None for other modules."""
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return 0 if module.batch_first else 1
    return None
