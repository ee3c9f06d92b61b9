# SPDX-License-Identifier: Apache-2.0
"""Does the model keep its examples apart? Asked at construction, by a list and by a numerical probe.

The probe runs a small batch, sends back the gradient of ONE example's output, and looks at what each layer
recorded for the others: anything but zero means that examples are mixed, whatever the code looks like.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from clipping.errors import MixesExamples
from clipping.grads import SampleGrads
from clipping.rules.generic import is_floating
from clipping.rules.registry import Inputs
from clipping.tape import Tape

_BATCH_NORM = (
    "use GroupNorm instead: opacus.validators.ModuleValidator.fix(model) replaces BatchNorm by it, and "
    "model.eval() on a frozen BatchNorm keeps its public statistics"
)
_RECURRENT = "use opacus.layers.DPLSTM, DPGRU or DPRNN, whose cells are linear layers"


def _fault(module: nn.Module) -> str | None:
    """Why `module` cannot be trained privately, with the remedy; None where the list knows no reason."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # pyright: ignore
        return "it has no parameters before its first call; run the model once before making it private"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        return f"it normalises each example by the whole batch; {_BATCH_NORM}"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return (
            "its running statistics are un-noised averages over private examples; track_running_stats=False"
        )
    if isinstance(module, nn.RNNBase) and any(p.requires_grad for p in module.parameters()):
        return f"its fused kernel hides the gradient of each example; {_RECURRENT}"
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad and parameter.dtype == torch.float16:
            return (
                f"its parameter {name!r} is float16, whose loss scaling looks at un-noised gradients; keep the "
                "parameters in float32 (bfloat16 autocast is fine)"
            )
    return None


def refuse_by_list(model: nn.Module) -> None:
    """Raise `MixesExamples` naming every module that cannot be trained privately, and what to do about it."""
    faults = [
        f"{name or 'model'!r} ({type(module).__name__}): {fault}"
        for name, module in model.named_modules()
        if (fault := _fault(module)) is not None
    ]
    if faults:
        raise MixesExamples(
            "expected a model whose modules treat each example alone; got "
            + "; ".join(faults[:4])
            + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave buffers and random state as they were: the probe must not be a training step."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[name])


def refuse_mixed(found: dict[str, SampleGrads], chosen: int, what: str) -> None:
    """Raise `MixesExamples` unless the recorded gradients of all examples but `chosen` are exactly zero."""
    for name, grads in found.items():
        others = grads.sq_norm()
        others[chosen] = 0
        if bool((others != 0).any()):
            raise MixesExamples(
                f"expected the {what} of one example to depend on that example alone; got a gradient of parameter "
                f"{name!r} from another example; look for BatchNorm-like statistics, attention across the batch, "
                "contrastive or batch-averaged losses, and positions whose first dimension is not the batch"
            )


def probe(model: nn.Module, inputs: Inputs, *, batch_dim: int = 0) -> None:
    """Run `model` on `inputs` (at least 2 examples) and refuse it where one example reaches another.

    Buffers, random state and gradients are left as they were. Raises `MixesExamples`.
    """
    seen: list[dict[str, SampleGrads]] = []
    with (
        _undisturbed(model),
        torch.enable_grad(),
        Tape(model, lambda f, _: seen.append(f), batch_dim=batch_dim),
    ):
        outputs = model(*inputs.args, **dict(inputs.kwargs))
        floating = [x for x in pytree.tree_leaves(outputs) if is_floating(x) and x.requires_grad]
        rows = [x.movedim(batch_dim, 0) if x.dim() > batch_dim else x for x in floating if x.dim() > 0]
        if not rows or rows[0].shape[0] < 2:
            return
        chosen = rows[0].shape[0] - 1
        picked: Tensor = torch.stack([x[chosen].sum().real for x in rows if x.shape[0] == chosen + 1]).sum()
        picked.backward()
    for found in seen:
        refuse_mixed(found, chosen, "output")


def examine(model: nn.Module, inputs: Inputs | None = None, *, batch_dim: int = 0) -> None:
    """Refuse a model that mixes examples: by the list, and by `probe` where `inputs` are given.

    Raises `MixesExamples`, or ValueError where nothing is trainable.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "expected a model with trainable parameters; got none that requires a gradient; unfreeze some or add "
            "an adapter"
        )
    refuse_by_list(model)
    if inputs is not None:
        probe(model, inputs, batch_dim=batch_dim)
