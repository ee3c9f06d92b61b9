# SPDX-License-Identifier: Apache-2.0
"""The signals that attacks need, of any torch model: computed once, without gradients, and kept on disk if asked.

The law of this file: a record's signals are those of the record alone, and the model comes out as it went in.

Shapes: B examples of a batch, n examples, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dpopt.atomic_files import written_file
from dpopt.attacks.scores import FloatArray

Example = TypeVar("Example")
Seen = Callable[[int], object]
"""Told how many more records are done."""


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """A block without gradients in which `models` are in evaluation mode; each module's mode is restored."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        with torch.no_grad():
            for model in models:
                model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def example_losses(
    model: nn.Module,
    examples: Sequence[Example],
    losses: Callable[[nn.Module, Sequence[Example]], Tensor],
    *,
    batch_size: int = 256,
    seen: Seen | None = None,
) -> FloatArray:
    """The loss of each example under any torch module.

    Args:
        model: the model under attack, on whatever device it is.
        examples: n examples, of any kind that `losses` takes.
        losses: (model, B examples) -> (B,), one loss for each example, which depends on that example alone.
        batch_size: examples at a time.
        seen: told how many more are done, for a progress bar.

    Returns:
        (n,), in the order of `examples`; exp(-loss) is the probability that RMIA and LiRA ask for, where the loss is
        a cross-entropy.

    Raises:
        ValueError: `losses` returns another shape than (B,).

    Example:
        >>> model = nn.Linear(2, 1)
        >>> points = [torch.zeros(2), torch.ones(2)]
        >>> example_losses(model, points, lambda model, batch: model(torch.stack(list(batch))).square().mean(1)).shape
        (2,)
    """
    found = np.empty(len(examples))
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            result = losses(model, batch)
            if tuple(result.shape) != (len(batch),):
                raise ValueError(
                    f"expected one loss for each of {len(batch)} examples; got shape {tuple(result.shape)}; compute it "
                    "with reduction='none' and average over each example's own parts"
                )
            found[start : start + len(batch)] = result.double().cpu().numpy()
            if seen is not None:
                seen(len(batch))
    return found


def class_confidences(logits: FloatArray | Tensor, labels: NDArray[np.integer] | Tensor) -> FloatArray:
    """LiRA's phi of a classifier, log(p_y / (1 - p_y)), from logits, without forming p.

    Args:
        logits: (n, C).
        labels: (n,), the true classes.

    Returns:
        (n,): the label's logit minus the log-sum-exp of the others.
    """
    scores = torch.as_tensor(logits).double().cpu()
    chosen = torch.as_tensor(labels).long().cpu().unsqueeze(1)
    own = scores.gather(1, chosen).squeeze(1)
    others = scores.scatter(1, chosen, -torch.inf).logsumexp(1)
    return (own - others).numpy()


def classifier_logits(
    model: nn.Module,
    inputs: Mapping[str, Tensor] | Tensor,
    *,
    batch_size: int = 256,
    seen: Seen | None = None,
) -> Tensor:
    """(n, C): the logits of a classifier, a plain module or one of Hugging Face (`.logits`), in float64 on the CPU.

    Args:
        model: takes a batch of `inputs`: keyword arguments of a mapping, or one tensor.
        inputs: n examples along dimension 0 of each tensor; padded ones with their attention mask.
        batch_size: examples at a time.
        seen: told how many more are done.
    """
    fields = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
    number = len(next(iter(fields.values())))
    device = next(model.parameters()).device
    rows = []
    with evaluating(model):
        for start in range(0, number, batch_size):
            part = {name: value[start : start + batch_size].to(device) for name, value in fields.items()}
            output = model(part[""]) if "" in part else model(**part)
            rows.append(getattr(output, "logits", output).double().cpu())
            if seen is not None:
                seen(len(rows[-1]))
    return torch.cat(rows)


def fingerprint(*parts: nn.Module | Tensor | bytes | str) -> str:
    """A digest of models (names and values of their parameters and buffers), tensors and text, as a cache's key."""
    digest = hashlib.sha256()
    for part in parts:
        tensors = part.state_dict() if isinstance(part, nn.Module) else {"": part}
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                about = f"{name}{value.dtype}{tuple(value.shape)}"
                raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            else:
                about, raw = name, value.encode() if isinstance(value, str) else value
            digest.update(f"{len(about)}:{len(raw)}:{about}".encode() + raw)
    return digest.hexdigest()[:32]


def cached(folder: Path | None, key: str, compute: Callable[[], dict[str, NDArray]]) -> dict[str, NDArray]:
    """What `compute` returns, read from `folder` where a call with this key has left it; None keeps nothing.

    What is kept tells about the records: the folder is made for its owner's eyes alone.
    """
    if folder is None:
        return compute()
    path = folder / f"{key}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as held:
            return dict(held)
    found = compute()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    written_file(path, lambda file: cast("Any", np.savez)(file, **found))
    return found
