# SPDX-License-Identifier: Apache-2.0
"""The familiar door: `PrivacyEngine().make_private(...)` around an ordinary training loop.

A facade over `PrivateTraining`: a backward collects clipped gradients, `optimizer.step()` charges, noises and
then steps. Model, optimizer and loss stay the user's own objects.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from accountants import ADD_REMOVE
from accountants import accountant as find_accountant
from accountants.calibrate import noise_multiplier as calibrate
from accountants.relations import check_relation
from clipping.loss_checks import LossChecks, LossReport
from dpopt.arguments import (
    ScalerMark,
    check_optimizer,
    check_reduction,
    check_switches,
    estimator_of,
    refuse_scaler,
    refuse_token_labels,
)
from dpopt.budget import Budget
from dpopt.estimators.estimator import Estimator, Plain
from dpopt.estimators.named import Run
from dpopt.estimators.prices import priced
from dpopt.gradients import clear_gradients
from dpopt.loader import check_loader, private_loader
from dpopt.mechanisms import GaussianMechanism
from dpopt.samplers import noise_within, require_sized, sized
from dpopt.sampling import PoissonSampling, Sampling
from dpopt.training import PrivateTraining


class PrivacyEngine:
    """Makes an ordinary PyTorch training loop private; keyword-compatible with Opacus 1.6.

    `accountant` is one of `accountants`' names. `ledger` is where charges are kept (default: a new file under
    `privacy-ledgers/`, printed); another configuration than its last run had is refused without
    `new_configuration`. `secure_mode` draws batches and noise exactly, from a cipher (`dpopt.tiers`).
    `sampler` is one of `dpopt.samplers`: "balls-in-bins" and "shuffled" go through the records once an epoch, and
    are priced as that; "shuffled" has a price under the `relation` "zero-out-one" or "replace-one" only.
    `insecure_seed` makes runs reproducible and *not private*.

        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0)
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        print(engine.get_epsilon(delta=1e-5))

    The three objects returned are the model and the optimizer given, and a loader of Poisson batches. The
    loss must be the mean (or, with `loss_reduction="sum"`, the sum) of losses that each depend on one example:
    class weights or masks that make the mean a weighted one do not. The number of records counts as public.
    Calling `backward()` on parts of a batch accumulates; `detach()` ends the run and leaves no hook behind.
    """

    def __init__(
        self,
        *,
        accountant: str = "prv",
        secure_mode: bool = False,
        sampler: str = "poisson",
        relation: str = ADD_REMOVE,
        ledger: str | Path | None = None,
        new_configuration: bool = False,
        insecure_seed: int | None = None,
    ) -> None:
        find_accountant(accountant)
        check_relation(relation)
        require_sized(sampler)
        self._randomness = "secure" if secure_mode else "fast"
        self._sampler = sampler
        self._relation = relation
        self._new_configuration = new_configuration
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
        int(len(dataset) * rate). `clipping` is one of `dpopt.estimators.ESTIMATORS`: a way to clip ("flat", "automatic",
        "per_layer", ...; with "per_layer" also a list of norms, one per trainable parameter, as in Opacus), or another
        estimator, with numbers where wanted: "quantile", "two_threshold:rest=4". Its guarantee is printed.
        `grad_sample_mode` and `wrap_model` are
        accepted and change nothing: one engine serves all modes, and nothing is wrapped. A `criterion` is only
        asked whether it reduces as `loss_reduction` says.
        """
        check_switches(
            poisson_sampling or self._sampler != "poisson", grad_sample_mode, rand_on_empty, noise_generator
        )
        check_reduction(loss_reduction, criterion)
        estimator = self._estimator(clipping, module, data_loader, max_grad_norm)
        return self._attach(
            module, optimizer, data_loader, GaussianMechanism(noise_multiplier),
            estimator, 0 if batch_first else 1, loss_reduction, None,
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
        check_switches(
            poisson_sampling or self._sampler != "poisson", grad_sample_mode, rand_on_empty, noise_generator
        )
        check_reduction(loss_reduction, criterion)
        estimator = self._estimator(clipping, module, data_loader, max_grad_norm)
        noise = self._calibrated(estimator, data_loader, Budget(target_epsilon, target_delta), epochs)
        return self._attach(
            module, optimizer, data_loader, GaussianMechanism(noise),
            estimator, 0 if batch_first else 1, loss_reduction,
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

    def explain(self) -> str:
        """A table of the parameters: how the norm and the sum of each were computed last, and why."""
        return self.training.explain()

    def evaluate(self, loss: Callable[[], Tensor], *, records: Sequence[int] | None = None) -> None:
        """The backward of `loss()`, a loss for each example (B,), at as many points as the estimator needs.

        In place of `loss.backward()`, for the estimators that say so. `records` are the indices of the rows in the
        dataset, for those that remember each record: let the dataset's items carry them, as a collate function may
        change the order.
        """
        with self._checks.given():
            self.training.evaluate(loss, records=records)

    def backward(self, losses: Tensor) -> None:
        """The backward of `losses`, shape (B,): one loss for each example, each normalised by that example alone.

        In place of `loss.backward()`, and of the mean or sum before it: for language models, whose mean over tokens
        divides each example by the tokens of all, for weighted classes, and for every other loss that
        `loss.backward()` refuses. A factor may follow a public schedule. Raises MixesExamples where something was
        seen to bring examples together.

            for batch in loader:
                optimizer.zero_grad()
                engine.backward(dpopt.causal_lm_losses(model(batch).logits, batch))
                optimizer.step()

        Guarantees
        ----------
        The gradient of row i of the losses, and nothing else, is clipped as that of example i
        (test_guarantee_backward_of_losses_clips_each_row). What `loss.backward()` checks, and what cannot be seen:
        `clipping.loss_checks`.
        """
        with self._checks.given(losses):
            self.training.accumulate(losses)

    @property
    def loss_report(self) -> LossReport:
        """Which checks the losses of this run have passed; it can be printed. Tells nothing of the data."""
        return self.training.loss_report

    @property
    def _checks(self) -> LossChecks:
        checks = self.training.sum.checks
        assert checks is not None
        return checks

    def discard(self) -> None:
        """Drop what the current step collected (after an out-of-memory error, say), to run its batch again."""
        self.training.discard()

    def same_examples(self) -> AbstractContextManager[None]:
        """A block of several backwards of the same examples: see `PrivateTraining.same_examples`."""
        return self.training.same_examples()

    def paused(self) -> AbstractContextManager[None]:
        """A block in which nothing is recorded and gradients reach inputs only: see `PrivateTraining.paused`."""
        return self.training.paused()

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
        estimator: Estimator,
        batch_dim: int,
        loss_reduction: str,
        budget: Budget | None,
    ) -> tuple[nn.Module, Optimizer, DataLoader[Any]]:
        if self._training is not None:
            raise RuntimeError(
                "expected a fresh engine; got one that already made a model private; use one PrivacyEngine per model"
            )
        check_loader(loader)
        check_optimizer(module, optimizer)
        training = PrivateTraining(
            module,
            estimator=estimator,
            mechanism=mechanism,
            sampling=self._sampling(loader),
            budget=budget,
            ledger=self._ledger,
            accountant_name=self._accountant,
            relation=self._relation,
            batch_dim=batch_dim,
            mean_losses=loss_reduction == "mean",
            randomness=self._randomness,
            insecure_seed=self._insecure_seed,
            new_configuration=self._new_configuration,
        )
        self._training = training.__enter__()
        print(f"dpopt: {estimator.guarantee}", file=sys.stderr)
        self._hooks += [optimizer.register_step_pre_hook(self._before_step), ScalerMark.on(optimizer)]
        self._hooks.append(module.register_forward_pre_hook(refuse_token_labels, with_kwargs=True))
        self._hooks.append(module.register_forward_hook(training.sum.probing.probe_outputs))
        training.check_losses()
        return module, optimizer, private_loader(loader, training)

    def _estimator(
        self,
        clipping: str,
        module: nn.Module,
        loader: DataLoader[Any],
        max_grad_norm: float | Sequence[float],
    ) -> Estimator:
        check_loader(loader)
        norm = float(max_grad_norm) if isinstance(max_grad_norm, int | float) else 1.0
        num_records = len(loader.dataset)  # pyright: ignore[reportArgumentType]
        return estimator_of(clipping, Run(module, norm, num_records, self._sampling(loader)), max_grad_norm)

    def _sampling(self, loader: DataLoader[Any]) -> Sampling:
        num_records = len(loader.dataset)  # pyright: ignore[reportArgumentType]
        if self._sampler == "poisson":  # as Opacus: the loader's length gives the rate
            rate = 1 / len(loader)
            return PoissonSampling(rate, max(1, int(num_records * rate)))
        assert loader.batch_size is not None  # check_loader has seen to it
        return sized(self._sampler, num_records=num_records, batch_size=loader.batch_size)

    def _calibrated(
        self, estimator: Estimator, loader: DataLoader[Any], budget: Budget, epochs: int
    ) -> float:
        sampling = self._sampling(loader)
        plain = isinstance(estimator, Plain)
        if plain and isinstance(sampling, PoissonSampling) and self._relation == ADD_REMOVE:
            return calibrate(
                epsilon=budget.epsilon, delta=budget.delta, sampling_rate=sampling.sampling_rate,
                steps=epochs * len(loader), accountant=self._accountant,
            )  # fmt: skip
        rounds = epochs if sampling.steps_per_charge > 1 else epochs * len(loader)
        rule = find_accountant(self._accountant, self._relation)
        return noise_within(budget, rule, priced(estimator, sampling, rounds))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(x is not None for x in (*args[1:], *kwargs.values())):  # args[0] is the optimizer itself
            raise ValueError(
                "expected optimizer.step() without a closure; got one, which would look at the batch several times "
                "per release; call backward() before step()"
            )
        refuse_scaler(optimizer)
        step = self.training.sum
        check_optimizer(self.training.model, optimizer)
        if step.hold:
            clear_gradients(step.parameters.values())
            return
        if step.num_drawn is not None and step.num_added < step.num_drawn:
            raise RuntimeError(
                "expected backward() through the private model for every drawn example before optimizer.step(); got "
                "fewer examples (or several passes whose rows were taken for the same examples); run the batch in "
                "one forward, or one backward for each part, or use BatchMemoryManager"
            )
        if step.checks is not None:
            step.checks.settle()
        self.training.release()
