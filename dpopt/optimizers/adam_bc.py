# SPDX-License-Identifier: Apache-2.0
"""Adam with the known variance of the noise taken out of its second moment (DP-AdamBC).

A private gradient is g + n: n is noise of a public standard deviation s, the same in each coordinate of a
parameter. Adam's v is an average of (g + n)^2, that is of g^2 + s^2. Where s is larger than g, as it mostly is, v
is nearly the same number everywhere, and Adam is SGD with momentum. Here s^2 is averaged as v is, and subtracted.

The law of this file: it sees released gradients and public numbers only.
"""
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NoiseStds = float | Mapping[Tensor, float]
"""Standard deviation of the noise in one coordinate of `.grad`: one number, or one for each parameter."""

_PRECISE = (torch.float32, torch.float64)


class NoisyRun(Protocol):
    """What tells the noise of its last release: `dpopt.PrivateTraining`."""

    model: nn.Module

    @property
    def noise_stds(self) -> Mapping[str, float]:
        """Name of a parameter of `model` -> standard deviation of the noise in its last written `.grad`."""
        ...


@runtime_checkable
class RunOwner(Protocol):
    """What holds such a run, perhaps later: `dpopt.PrivacyEngine`."""

    @property
    def training(self) -> NoisyRun:
        """The run."""
        ...


class AdamBC(Optimizer):
    """AdamW on the second moment of the signal: v_hat less the average of the noise's variance, at least `floor`.

    `noise_std` is the standard deviation of the noise in `.grad`, for all parameters or for each; or a function
    that tells it at every step, such as `noise_std_of(private)`. It is an attribute that may be replaced, and no
    part of `state_dict()`. It must be that of the gradients as they are at `step()`: whatever scales, clips or
    averages them after the release changes it. A parameter without a `.grad` is passed over, as in torch. Weight
    decay is decoupled. The update is lr * m_hat / (sqrt(max(v_hat - noise, floor)) + eps); the paper has no `eps`.

    `floor` is gamma' of the paper, in units of squared gradients, and the paper tunes it. By default it is the
    standard deviation of what the noise alone leaves in v_hat, sqrt(2 sum_i w_i^2 s_i^4) for weights w_i and noise
    s_i: below that, the difference is mostly noise. This is our choice, without a theorem: it follows clip norms that
    change, begins at about Adam's own denominator, and is 0 where there is no noise. The steps are larger than
    Adam's: begin with a third of its learning rate. Whether the correction helps depends on the task: Chooi et al.
    2025 (arXiv:2511.07843) report lower accuracy with it under decoupled weight decay.

    Raises ValueError for parameters of less than float32 precision, where a difference of nearly equal numbers is
    lost; for a `noise_std` that is negative, not finite or missing; RuntimeError for sparse gradients.

        private = PrivateTraining(model, ...)
        optimizer = AdamBC(model.parameters(), lr=1e-3, noise_std=noise_std_of(private))

    At the familiar door the optimizer comes first: `noise_std=noise_std_of(engine)`.

    Guarantees
    ----------
    The step is post-processing of the released gradients: it costs nothing (Dwork and Roth 2014, proposition 2.1).

    E[v_hat - noise] = E[sum_i w_i g_i^2], w_i = (1 - beta2) beta2^(t-i) / (1 - beta2^t), without any assumption on g_i
    or on how s_i was chosen from the past: (g_i + n_i)^2 = g_i^2 + 2 g_i n_i + n_i^2, and given the past and the batch,
    E n_i = 0 and E n_i^2 = s_i^2; both averages have the weights w_i
    (test_guarantee_the_noise_averages_out_of_the_second_moment). The floor makes the estimate larger where it acts.
    With s_i constant this is DP-AdamBC (Tang, Shpilevskiy and Lecuyer 2024, arXiv:2312.14334). Without noise and
    floor every step equals torch's AdamW bit for bit on CPU (test_guarantee_without_noise_it_is_adamw).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        noise_std: NoiseStds | Callable[[], NoiseStds],
        floor: float | None = None,
    ) -> None:
        self.noise_std = noise_std
        if not callable(noise_std) and not isinstance(noise_std, Mapping):
            _require("noise_std", noise_std, 0.0)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "floor": floor}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with options of its own, checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict()` of an `AdamBC` gave."""
        if any("noise_var" not in state for state in state_dict["state"].values()):
            raise ValueError(
                "expected the state of an AdamBC, which knows the noise in its averages; got another optimizer's; "
                "begin with a fresh state"
            )
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy holds: torch's own would leave `noise_std` behind."""
        return {**super().__getstate__(), "noise_std": self.noise_std}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on the released gradients; `closure`, as in torch, is run first and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = self.noise_std() if callable(self.noise_std) else self.noise_std
        # Every number is checked before the first parameter moves: a refused step can be tried again.
        found = [self._with_gradients(group, given) for group in self.param_groups]
        for group, (params, stds) in zip(self.param_groups, found, strict=True):
            if params:
                _update(params, [self.state[p] for p in params], stds, group)
        return loss

    def _with_gradients(self, group: dict[str, Any], given: NoiseStds) -> tuple[list[Tensor], list[float]]:
        """The parameters of a group that have a gradient, and the noise of each."""
        params = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in params):
            raise RuntimeError(
                "expected dense gradients; got a sparse one; set sparse=False on the embedding: noise is dense"
            )
        return params, [_std_of(p, given) for p in params]


def noise_std_of(source: NoisyRun | RunOwner) -> Callable[[], dict[Tensor, float]]:
    """The noise in the gradients that a run released last, asked for at each step: clip norms may change.

    Raises ValueError before the first release, and for estimators whose gradient holds the noise of several releases.
    `source` is a `PrivateTraining`, or a `PrivacyEngine`, whose run may begin later, in `make_private`.
    """

    def noise_stds() -> dict[Tensor, float]:
        run = source.training if isinstance(source, RunOwner) else source
        if not run.noise_stds:
            raise ValueError(
                "expected a gradient with the noise of the last release; got none released yet, or an estimator that "
                "makes its gradient of several releases; use another optimizer with it"
            )
        return {run.model.get_parameter(name): std for name, std in run.noise_stds.items()}

    return noise_stds


def _std_of(parameter: Tensor, given: NoiseStds) -> float:
    if not isinstance(given, Mapping):
        return _require("noise_std", given, 0.0)
    if parameter not in given:
        raise ValueError(
            f"expected a noise_std for every parameter with a gradient; got none for one of shape "
            f"{tuple(parameter.shape)}; give it (0.0 where its gradient holds no noise), or train it by another optimizer"
        )
    return _require("noise_std", given[parameter], 0.0)


def _require(name: str, value: float, least: float, below: float = math.inf) -> float:
    if not (math.isfinite(value) and least <= value < below):
        raise ValueError(f"expected a {name} >= {least} and < {below}; got {value}; correct the option")
    return float(value)


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        _require(name, group[name], 0.0)
    for beta in group["betas"]:
        _require("beta", beta, 0.0, 1.0)
    if group["floor"] is not None:
        _require("floor", group["floor"], 0.0)
    coarse = {p.dtype for p in group["params"]} - set(_PRECISE)
    if coarse:
        raise ValueError(
            f"expected parameters in float32 or float64; got {sorted(map(str, coarse))}, where v and the noise's "
            "variance are equal after rounding; keep the trained parameters in float32 (autocast the forward), or use "
            "torch's AdamW"
        )


def _update(
    params: list[Tensor], states: list[dict[str, Any]], stds: list[float], group: dict[str, Any]
) -> None:
    """One step of the parameters of a group; every list has one entry for each."""
    (beta1, beta2), lr = group["betas"], float(group["lr"])
    for p, state, std in zip(params, states, stds, strict=True):
        _advance(p, state, std * std, beta2)
    means = [state["exp_avg"] for state in states]
    squares = [state["exp_avg_sq"] for state in states]
    grads = [p.grad for p in params if p.grad is not None]
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)

    whole = [1 - beta2 ** state["step"] for state in states]
    floors = [
        math.sqrt(2 * state["noise_sq"]) if group["floor"] is None else group["floor"] * part
        for state, part in zip(states, whole, strict=True)
    ]
    # In units of v, not v_hat: the factor 1 / (1 - beta2^t) is common to v and the noise's average.
    signal = torch._foreach_sub(squares, [state["noise_var"] for state in states])
    torch._foreach_clamp_min_(signal, floors)
    torch._foreach_sqrt_(signal)
    torch._foreach_div_(signal, [part**0.5 for part in whole])
    torch._foreach_add_(signal, group["eps"])
    sizes = [-(lr / (1 - beta1 ** state["step"])) for state in states]
    torch._foreach_addcdiv_(params, means, signal, sizes)


def _advance(parameter: Tensor, state: dict[str, Any], variance: float, beta2: float) -> None:
    """Count the step, and average the noise's variance (`noise_var`) and its square's weights as v is."""
    if not state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        # Numbers, not tensors: loading a state casts tensors to the parameter's precision.
        state["noise_var"] = state["noise_sq"] = 0.0
    state["step"] += 1
    state["noise_var"] = beta2 * state["noise_var"] + (1 - beta2) * variance
    state["noise_sq"] = beta2**2 * state["noise_sq"] + (1 - beta2) ** 2 * variance**2
