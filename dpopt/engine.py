# SPDX-License-Identifier: Apache-2.0
"""The familiar door: `PrivacyEngine().make_private(...)` around an ordinary training loop.

A facade over `PrivateTraining`: a backward collects clipped gradients, `optimizer.step()` charges, noises and
then steps. Model, optimizer and loss stay the user's own objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from accountants import accountant as find_accountant
from accountants.calibrate import noise_multiplier as calibrate
from clipping import Clipper, FlatClipper, per_layer, per_parameter
from dpopt.budget import Budget
from dpopt.loader import check_loader, private_loader
from dpopt.mechanisms import GaussianMechanism
from dpopt.sampling import PoissonSampling
from dpopt.step import clear_gradients
from dpopt.training import PrivateTraining

_MODES = ("hooks", "functorch", "ew", "ghost")


class PrivacyEngine:
    """Makes an ordinary PyTorch training loop private; keyword-compatible with Opacus 1.6.

    `accountant` is "prv" or "rdp". `ledger` is where charges are kept (default: a new file under
    `privacy-ledgers/`, printed). `insecure_seed` makes runs reproducible and *not private*.

        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        print(engine.get_epsilon(delta=1e-5))

    The three objects returned are the model and the optimizer given, and a loader of Poisson batches. The
    loss must be the mean (or, with `loss_reduction="sum"`, the sum) of losses that each depend on one example.
    Calling `backward()` on parts of a batch accumulates; `detach()` ends the run and leaves no hook behind.
    """

    def __init__(
        self,
        *,
        accountant: str = "prv",
        secure_mode: bool = False,
        ledger: str | Path | None = None,
        insecure_seed: int | None = None,
    ) -> None:
        find_accountant(accountant)
        if secure_mode:
            raise ValueError(
                "expected secure_mode=False; got True, whose cryptographic discrete noise is not implemented; the "
                "default already keys its generators with 256 secret bits of the operating system"
            )
        self._accountant = accountant
        self._ledger = ledger
        self._insecure_seed = insecure_seed
        self._training: PrivateTraining | None = None
        self._hooks: list[Any] = []

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: object = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
    ) -> tuple[nn.Module, Optimizer, DataLoader[Any]]:
        """Return (module, optimizer, loader), the first two as given.

        As in Opacus, the sampling rate is 1 / len(data_loader) and the noisy sum is divided by
        int(len(dataset) * rate). `clipping` is "flat" or "per_layer" (a list of norms, one per trainable
        parameter, or one total norm shared evenly by the layers). `grad_sample_mode`, `criterion` and
        `wrap_model` are accepted and change nothing: one engine serves all modes, and nothing is wrapped.
        """
        if noise_generator is not None:
            raise ValueError(
                "expected noise_generator=None; got a generator, whose seed would undo the noise; for a "
                "reproducible, insecure run use PrivacyEngine(insecure_seed=...)"
            )
        _check_switches(poisson_sampling, grad_sample_mode, rand_on_empty, loss_reduction)
        return self._attach(
            module, optimizer, data_loader, GaussianMechanism(noise_multiplier),
            _clipper(clipping, module, max_grad_norm), 0 if batch_first else 1, loss_reduction, None,
        )  # fmt: skip

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: object = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float | Sequence[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
    ) -> tuple[nn.Module, Optimizer, DataLoader[Any]]:
        """`make_private` with the least noise that keeps `epochs` epochs within (target_epsilon, target_delta).

        Steps beyond the budget raise `BudgetExhausted`.
        """
        check_loader(data_loader)
        noise = calibrate(
            epsilon=target_epsilon,
            delta=target_delta,
            sampling_rate=1 / len(data_loader),
            steps=epochs * len(data_loader),
            accountant=self._accountant,
        )
        if noise_generator is not None:
            raise ValueError(
                "expected noise_generator=None; got a generator; use PrivacyEngine(insecure_seed=...)"
            )
        _check_switches(poisson_sampling, grad_sample_mode, rand_on_empty, loss_reduction)
        return self._attach(
            module, optimizer, data_loader, GaussianMechanism(noise),
            _clipper(clipping, module, max_grad_norm), 0 if batch_first else 1, loss_reduction,
            Budget(target_epsilon, target_delta),
        )  # fmt: skip

    def get_epsilon(self, delta: float) -> float:
        """Upper bound on epsilon of everything charged on this engine's ledger so far."""
        return self.training.epsilon(delta)

    @property
    def accountant(self) -> PrivacyEngine:
        """Itself: scripts written for Opacus ask `engine.accountant.get_epsilon(delta=...)`."""
        return self

    @property
    def noise_multiplier(self) -> float:
        """Noise standard deviation over sensitivity."""
        mechanism = self.training.mechanism
        assert isinstance(mechanism, GaussianMechanism)
        return mechanism.noise_multiplier

    @property
    def training(self) -> PrivateTraining:
        """The run behind this engine."""
        if self._training is None:
            raise RuntimeError(
                "expected an engine in use; got one before make_private; call make_private first"
            )
        return self._training

    def discard(self) -> None:
        """Drop what the current step collected (after an out-of-memory error, say), to run its batch again."""
        self.training.discard()

    def detach(self) -> None:
        """End the run: remove every hook and close the ledger. Model and optimizer are ordinary again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._training is not None:
            self._training.__exit__(None, None, None)

    def __enter__(self) -> PrivacyEngine:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    def _attach(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        loader: DataLoader[Any],
        mechanism: GaussianMechanism,
        clipper: Clipper,
        batch_dim: int,
        loss_reduction: str,
        budget: Budget | None,
    ) -> tuple[nn.Module, Optimizer, DataLoader[Any]]:
        if self._training is not None:
            raise RuntimeError(
                "expected a fresh engine; got one that already made a model private; use one PrivacyEngine per model"
            )
        check_loader(loader)
        _check_optimizer(module, optimizer)
        rate = 1 / len(loader)
        expected = max(1, int(len(loader.dataset) * rate))  # pyright: ignore[reportArgumentType]
        training = PrivateTraining(
            module,
            clipper=clipper,
            mechanism=mechanism,
            sampling=PoissonSampling(rate, expected),
            budget=budget,
            ledger=self._ledger,
            accountant_name=self._accountant,
            example_inputs=_sample_inputs(module, loader, batch_dim),
            batch_dim=batch_dim,
            mean_losses=loss_reduction == "mean",
            insecure_seed=self._insecure_seed,
        )
        self._training = training.__enter__()
        self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        self._hooks.append(module.register_forward_pre_hook(_refuse_token_labels, with_kwargs=True))
        return module, optimizer, private_loader(loader, training)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):  # args[0] is the optimizer itself
            raise ValueError(
                "expected optimizer.step() without a closure; got one, which would look at the batch several times "
                "per release; call backward() before step()"
            )
        if self.training.sum.hold:
            clear_gradients(self.training.sum.parameters.values())
            return
        self.training.release()


def _check_switches(poisson: bool, mode: str, rand_on_empty: bool, loss_reduction: str) -> None:
    if not poisson:
        raise ValueError(
            "expected poisson_sampling=True; got False: shuffled batches are not private at the price of Poisson "
            "batches (up to 60 times the epsilon); keep True, and bound memory with BatchMemoryManager"
        )
    if mode not in _MODES:
        raise ValueError(f"expected grad_sample_mode in {_MODES}; got {mode!r}; leave it out")
    if rand_on_empty:
        raise ValueError(
            "expected rand_on_empty=False; got True, which adds an example that nobody accounted for; an empty "
            "batch is a step of noise alone"
        )
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(
            f'expected loss_reduction "mean" or "sum"; got {loss_reduction!r}; say what your criterion does'
        )


def _clipper(clipping: str, module: nn.Module, max_grad_norm: float | Sequence[float]) -> Clipper:
    if clipping == "flat" and isinstance(max_grad_norm, int | float):
        return FlatClipper(float(max_grad_norm))
    if clipping == "per_layer":
        if isinstance(max_grad_norm, int | float):
            return per_layer(module, float(max_grad_norm))
        return per_parameter(module, list(max_grad_norm))
    raise ValueError(
        f'expected clipping="flat" with one max_grad_norm, or "per_layer"; got {clipping!r} with {max_grad_norm}; '
        "see the README for what each does"
    )


def _check_optimizer(module: nn.Module, optimizer: Optimizer) -> None:
    owned = {id(p) for p in module.parameters()}
    foreign = sum(
        id(p) not in owned for group in optimizer.param_groups for p in group["params"] if p.requires_grad
    )
    if foreign:
        raise ValueError(
            f"expected an optimizer over the module's own parameters; got {foreign} parameters of something else, "
            "which would be trained without noise; build the optimizer from module.parameters(), after moving the "
            "module to its device"
        )


def _sample_inputs(module: nn.Module, loader: DataLoader[Any], batch_dim: int) -> Any:
    """Three records as the model's probable input, for the probe at construction; None where that is unclear."""
    dataset: Any = loader.dataset
    if batch_dim != 0 or len(dataset) < 3:
        return None
    batch = loader.collate_fn([dataset[i] for i in range(3)])
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    device = next(module.parameters()).device
    if not isinstance(first, Tensor):
        return None
    first = first.to(device)
    buffers = [buffer.clone() for buffer in module.buffers()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module(first)
    except Exception:  # not this model's input: the list still guards it, the probe does not
        return None
    finally:
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), buffers, strict=True):
                buffer.copy_(value)
    return (first,)


def _refuse_token_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    labels = kwargs.get("labels")
    if torch.is_grad_enabled() and isinstance(labels, Tensor) and labels.dim() > 1:
        raise ValueError(
            f"expected no token labels in the private forward; got labels of shape {tuple(labels.shape)}: the "
            "model's own loss averages over the tokens of the whole batch, so examples rescale each other; compute "
            "dpopt.causal_lm_losses(logits, labels).mean() instead"
        )
