# SPDX-License-Identifier: Apache-2.0
"""Does the model keep its examples apart? Asked at construction, by a list and by a numerical probe.

The probe runs a small batch, sends back the gradient of ONE example's output, and looks at what each layer
recorded for the others: anything but zero means that examples are mixed, whatever the code looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from clipping.errors import MixesExamples
from clipping.gradients.sample_grads import SampleGrads
from clipping.modules.generic_rule import agree, batch_dim_of
from clipping.recording.tape import Tape
from clipping.reruns.nested_values import is_floating
from clipping.rules.registry import Inputs

_BATCH_NORM = (
    "use GroupNorm instead: dpopt.ModuleValidator.fix(model) replaces BatchNorm by it, and model.eval() on a frozen "
    "BatchNorm keeps its public statistics"
)


def _fault(module: nn.Module) -> str | None:
    """Why `module` cannot be trained privately, with the remedy; None where the list knows no reason."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # pyright: ignore
        return "it has no parameters before its first call; run the model once before making it private"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or not module.track_running_stats
    ):
        return f"it normalises each example by the whole batch; {_BATCH_NORM}"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return (
            "its running statistics are un-noised averages over private examples; track_running_stats=False"
        )
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad and parameter.dtype == torch.float16:
            return (
                f"its parameter {name!r} is float16, whose loss scaling looks at un-noised gradients; keep the "
                "parameters in float32 (bfloat16 autocast is fine)"
            )
    return None


def _balanced(model: nn.Module) -> list[str]:
    # The loss that transformers adds is a product of averages over all tokens of the batch.
    named = ((name, getattr(module, "config", None)) for name, module in model.named_modules())
    return [
        f"{name or 'model'!r}: its load-balancing loss averages over the batch; set "
        "config.output_router_logits = False"
        for name, config in named
        if getattr(config, "output_router_logits", False)
    ][:1]


def listed_faults(model: nn.Module) -> list[str]:
    """Every module that cannot be trained privately, by a list: its name, why, and what to do about it."""
    return [
        f"{name or 'model'!r} ({type(module).__name__}): {fault}"
        for name, module in model.named_modules()
        if (fault := _fault(module)) is not None
    ] or _balanced(model)


def refuse_by_list(model: nn.Module) -> None:
    """Raise `MixesExamples` naming every module that cannot be trained privately, and what to do about it."""
    faults = listed_faults(model)
    if faults:
        raise MixesExamples(
            "expected a model whose modules treat each example alone; got "
            + "; ".join(faults[:4])
            + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")
        )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave buffers and random state as they were: the probe must not be a training step."""
    held = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(x, x.clone()) for _, buffers in held for x in buffers.values() if x is not None]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)
            for module, buffers in held:
                module._buffers.clear()
                module._buffers.update(buffers)


def _require_known(table: nn.Module, args: tuple[object, ...]) -> None:
    """Forward pre-hook of an embedding: on a GPU an index beyond the table is no exception, but ends its context."""
    assert isinstance(table, nn.Embedding)
    if any(isinstance(x, Tensor) and x.numel() and int(x.max()) >= table.num_embeddings for x in args):
        raise IndexError("an index beyond the table")


def fits(model: nn.Module, inputs: Inputs) -> bool:
    """Whether `model` runs on `inputs` at all; nothing is recorded, and buffers and random state stay as they were."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks = [table.register_forward_pre_hook(_require_known) for table in tables]
    try:
        with _undisturbed(model), torch.no_grad():
            model(*inputs.args, **dict(inputs.kwargs))
    except Exception:  # whatever a model raises on inputs that are not made for it
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return True


def refuse_mixed(found: dict[str, SampleGrads], chosen: int, what: str) -> bool:
    """Raise `MixesExamples` unless the recorded gradients of all examples but `chosen` are exactly zero.

    Returns whether that says anything: False where the chosen example has no gradient itself.
    """
    witnessed = False
    for name, grads in found.items():
        norms = grads.sq_norm()
        # Infinity and NaN say nothing: a zero gradient times the infinity of a broken example.
        reached = (norms > 0) & torch.isfinite(norms)
        others = torch.arange(len(norms), device=norms.device) != chosen
        if bool((reached & others).any()):
            raise MixesExamples(
                f"expected the {what} of one example to depend on that example alone; got a gradient of parameter "
                f"{name!r} from another example; look for BatchNorm-like statistics, attention across the batch, "
                "contrastive or batch-averaged losses, rows that the model sorts (pack with enforce_sorted=False instead), and "
                "positions whose first dimension is not the batch"
            )
        witnessed = witnessed or bool(reached.any())
    return witnessed


class Apart:
    """A collector that refuses a gradient of any example but one, parameter by parameter, and keeps none.

    `chosen` counts from the end where it is negative. `on_complete` is called with B at the end. `witnessed`
    tells whether the chosen example had a gradient anywhere; without one, nothing was seen. `norms` are the squared norms
    of its gradients, by parameter.
    """

    unit = None

    def __init__(self, chosen: int, what: str, on_complete: Callable[[int], None] | None = None) -> None:
        self._chosen = chosen
        self._what = what
        self._on_complete = on_complete
        self.witnessed = False
        self.norms: dict[str, Tensor] = {}

    def ready(self, name: str, grads: SampleGrads, num_examples: int) -> None:
        """Look and drop."""
        chosen = self._chosen % max(1, num_examples)
        seen = refuse_mixed({name: grads}, chosen, self._what)
        if num_examples:
            self.norms[name] = grads.sq_norm()[chosen]
        self.witnessed = self.witnessed or seen

    def complete(self, num_examples: int) -> None:
        """Tell the number of examples."""
        if self._on_complete is not None:
            self._on_complete(num_examples)


class Together:
    """A collector that refuses a gradient of one example that is another beside those of the other examples.

    `known` are the squared norms of the gradients of examples that were sent back alone, by parameter. Backwards are
    linear: only code of a function's own can make it so (a gradient over the norm of all, say).
    """

    unit = None

    def __init__(self, known: Mapping[int, Mapping[str, Tensor]]) -> None:
        self._known = known

    def ready(self, name: str, grads: SampleGrads, num_examples: int) -> None:
        """Look and drop."""
        norms = grads.sq_norm()
        for chosen, alone in self._known.items():
            if name in alone and not _is_same(alone, name, norms[chosen]):
                raise MixesExamples(
                    "expected the gradient of one example to be the same beside those of other examples; got another one, of "
                    f"parameter {name!r}; look for autograd functions and hooks that scale a gradient by something of the whole "
                    "batch, and take it of each row by itself (dim=-1)"
                )

    def complete(self, num_examples: int) -> None:
        """Nothing to tell."""


def _is_same(known: Mapping[str, Tensor], name: str, found: Tensor) -> bool:
    half = found.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(found.device.type)
    allowed = (1e-1 if half else 1e-3) * known[name] + 1e-6 * torch.stack(list(known.values())).max()
    return bool((found - known[name]).abs() <= allowed) or not bool(torch.isfinite(found + known[name]))


def probe(model: nn.Module, inputs: Inputs, *, batch_dim: int = 0) -> None:
    """Run `model` on `inputs` (at least 2 examples) and refuse it where one example reaches another.

    Buffers, random state and gradients are left as they were. Raises `MixesExamples`.
    """
    for chosen in (0, -1):  # the first and the last: a running statistic reaches in one direction only
        num_examples = _refuse_gradients(model, inputs, chosen, batch_dim)
        if num_examples > 1:
            _refuse_influence(model, inputs, chosen % num_examples, num_examples, batch_dim)


def _refuse_influence(
    model: nn.Module, inputs: Inputs, chosen: int, num_examples: int, batch_dim: int
) -> None:
    """Refuse a model whose output for example `chosen` changes when the others become copies of it.

    Catches what sends back no gradient: detached statistics of the batch, capacities that examples share.
    """
    leaves, spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
    pairs = [(x, batch_dim_of(x, num_examples, batch_dim)) for x in leaves]
    copies = [x if d is None else x.narrow(d, chosen, 1).expand_as(x).contiguous() for x, d in pairs]
    rows: list[list[Tensor]] = []
    for values in (leaves, copies):
        args, kwargs = pytree.tree_unflatten(values, spec)
        with _undisturbed(model), torch.no_grad():  # both runs draw the same dropout
            floating = [x for x in pytree.tree_leaves(model(*args, **kwargs)) if is_floating(x)]
        found = [(x, batch_dim_of(x, num_examples, batch_dim)) for x in floating]
        rows.append([x.select(d, chosen).unsqueeze(0) for x, d in found if d is not None])
    if len(rows[0]) != len(rows[1]) or not all(agree(a, b) for a, b in zip(*rows, strict=True)):
        raise MixesExamples(
            "expected the output of one example to depend on that example alone; got another output beside other "
            "examples; look for statistics of the batch (detached ones too), shared capacities and top-k choices"
        )


def _refuse_gradients(model: nn.Module, inputs: Inputs, chosen: int, batch_dim: int) -> int:
    """Refuse gradients of other examples where only the output of `chosen` is sent back; returns the batch size."""
    with (
        _undisturbed(model),
        torch.enable_grad(),
        Tape(model, lambda _: Apart(chosen, "output"), batch_dim=batch_dim) as tape,
    ):
        outputs = model(*inputs.args, **dict(inputs.kwargs))
        floating = [x for x in pytree.tree_leaves(outputs) if is_floating(x) and x.requires_grad]
        rows = [x.movedim(batch_dim, 0) if x.dim() > 2 else x for x in floating if x.dim() > 0]
        num_examples = rows[0].shape[0] if rows else 0
        if num_examples > 1:
            alike = [x for x in rows if x.shape[0] == num_examples]
            tape.attribute(alike, num_examples)
            picked = [x[chosen].sum().real for x in alike]
            torch.stack([x.to(picked[0].dtype) for x in picked]).sum().backward()
    return num_examples


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


def model_inputs(given: Tensor | tuple | Mapping[str, object] | None, model: nn.Module) -> Inputs | None:
    """What the probe at construction feeds the model: `given`, or what a transformers model brings, or nothing.

    What it brings is three token sequences, whatever the model is: where they do not fit (a model of images or sounds,
    one with a decoder or a tiny vocabulary), there is nothing, and the probe waits for the first batch.
    """
    if isinstance(given, Mapping):
        return Inputs((), given)
    if given is not None:
        return Inputs(given if isinstance(given, tuple) else (given,), {})
    dummy = _dummy_inputs(model)
    return dummy if dummy is not None and fits(model, dummy) else None


def _dummy_inputs(model: nn.Module) -> Inputs | None:
    try:
        dummy = getattr(model, "dummy_inputs", None)
    except Exception:  # a property, which may ask for settings that this model has not
        return None
    if not isinstance(dummy, Mapping) or "input_ids" not in dummy:
        return None
    device = next(model.parameters()).device
    return Inputs((), {k: v.to(device) if isinstance(v, Tensor) else v for k, v in dummy.items()})
