# SPDX-License-Identifier: Apache-2.0
"""What `PrivacyEngine` is given in the words of Opacus, and what of it is refused: rather an error than a guess."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipping import Contribution, Tape, per_parameter
from dpopt.compatibility.adaptive_clipping import NAME as ADAPTIVE
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.plain import Plain
from dpopt.estimators.registry import Run, check_estimator, named_estimator
from dpopt.public_numbers import check_real

_MODES = ("hooks", "functorch", "ew", "ghost")
_REFUSED_MODES = {
    "no_op": "gradients that a script makes by itself are not known to be one example's each; leave it out, and run the "
    "model itself: its layers are recorded",
    "ghost_fsdp": "sharded models are not supported yet; leave it out, on one process and without FSDP2Wrapper",
}


def check_switches(poisson: bool, mode: str, rand_on_empty: bool, noise_generator: object) -> None:
    """Refuse switches of Opacus that would weaken the guarantee."""
    if noise_generator is not None:
        raise ValueError(
            "expected noise_generator=None; got a generator, whose seed would undo the noise; for a "
            "reproducible, insecure run use PrivacyEngine(insecure_seed=...)"
        )
    if not poisson:
        raise ValueError(
            "expected poisson_sampling=True; got False: shuffled batches are not private at the price of Poisson "
            "batches (up to 60 times the epsilon); keep True and bound memory with BatchMemoryManager, or name the sampler, "
            'priced as what it is: PrivacyEngine(sampler="balls-in-bins")'
        )
    if mode in _REFUSED_MODES:
        raise ValueError(f"expected grad_sample_mode in {_MODES}; got {mode!r}: {_REFUSED_MODES[mode]}")
    if mode not in _MODES:
        raise ValueError(f"expected grad_sample_mode in {_MODES}; got {mode!r}; leave it out")
    if rand_on_empty:
        raise ValueError(
            "expected rand_on_empty=False; got True, which adds an example that nobody accounted for; an empty "
            "batch is a step of noise alone"
        )


def check_reduction(loss_reduction: str, criterion: object) -> None:
    """Refuse a criterion whose reduction is another than `loss_reduction`, or weighs examples by their batch."""
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(
            f'expected loss_reduction "mean" or "sum"; got {loss_reduction!r}; say what your criterion does'
        )
    reduction = getattr(criterion, "reduction", loss_reduction)
    if reduction != loss_reduction:
        raise ValueError(
            f"expected a criterion that reduces by the {loss_reduction}, as loss_reduction says; got "
            f"reduction={reduction!r}, which would scale each example by the size of its batch; make them agree"
        )
    if loss_reduction == "mean" and getattr(criterion, "weight", None) is not None:
        raise ValueError(
            "expected a criterion whose mean counts each example once; got class weights, whose sum over the batch "
            'divides every example; use reduction="sum" with loss_reduction="sum"'
        )


def criterion_of(criterion: object, loss_reduction: str) -> object:
    """What ghost mode returns beside the rest: the criterion as given, or the cross entropy that Opacus would take."""
    return nn.CrossEntropyLoss(reduction=loss_reduction) if criterion is None else criterion


def one_norm(max_grad_norm: float | Sequence[float]) -> float | None:
    """The one clip norm, None for a list of them.

    Raises:
        ValueError: it is no number, or not a list of numbers.
    """
    if not isinstance(max_grad_norm, list | tuple):
        check_real("max_grad_norm", max_grad_norm)
        return float(max_grad_norm)  # pyright: ignore[reportArgumentType]
    for norm in max_grad_norm:
        check_real("max_grad_norm", norm)
    return None


def estimator_of(clipping: str, run: Run, max_grad_norm: float | Sequence[float]) -> Estimator:
    """The estimator that `clipping` and `max_grad_norm` describe; `run` says the rest."""
    if not isinstance(max_grad_norm, list | tuple):
        return named_estimator(clipping, run)
    if clipping != ADAPTIVE:
        check_estimator(clipping)
    if clipping != "per_layer":
        raise ValueError(
            f"expected one max_grad_norm with clipping={clipping!r}; got {max_grad_norm}; a list, of one norm for each "
            'trainable parameter, goes with clipping="per_layer"'
        )
    return Plain(Contribution(per_parameter(run.model, list(max_grad_norm))))


def refuse_token_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: refuse `labels=` of tokens, for which transformers averages over the whole batch.

    Numbers (B, L) are the targets of L binary labels or of L regressions, each a mean over elements.
    """
    labels = kwargs.get("labels")
    if not torch.is_grad_enabled() or not isinstance(labels, Tensor):
        return
    if labels.dim() > 1 and not labels.is_floating_point():
        raise ValueError(
            f"expected no token labels in the private forward; got labels of {labels.dim()} dimensions: the model's own loss "
            "averages over the tokens of the whole batch, so examples rescale each other; compute "
            "dpopt.causal_lm_losses(logits, labels).mean() instead, or pass these losses to engine.backward(losses)"
        )


def refusing_token_labels(model: nn.Module, tape: Tape) -> Callable[..., None]:
    """That hook for `model` itself while its examples are private: a copy of the model brings a copy of it along."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is model and not tape.is_aside:
            refuse_token_labels(module, args, kwargs)

    return hook
