# SPDX-License-Identifier: Apache-2.0
"""The familiar door: `PrivacyEngine().make_private(...)` around an ordinary training loop.

A facade over `PrivateTraining`: a backward collects clipped gradients, `optimizer.step()` charges, noises and
then steps. Model, optimizer and loss stay the user's own objects.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from accountants import ADD_REMOVE
from accountants import accountant as find_accountant
from accountants.relations import check_relation
from clipping.loss_checks import LossChecks, LossReport
from dpopt import checkpoint
from dpopt.budget.budget import Budget
from dpopt.budget.calibrated_noise import Standing
from dpopt.budget.declaration import accountant_of
from dpopt.budget.ledger_files import SharedLedger
from dpopt.compatibility.adaptive_clipping import AdaptiveClipping
from dpopt.compatibility.opacus_accountants import LedgerAccountant, check_orders, refuse_gdp
from dpopt.compatibility.opacus_arguments import (
    check_switches,
    criterion_of,
    refusing_token_labels,
)
from dpopt.compatibility.opacus_weights import accept_prefix
from dpopt.compatibility.optimizer_steps import OptimizerStep, ScalerMark, check_optimizer, check_steps
from dpopt.compatibility.poisson_loader import check_records
from dpopt.compatibility.private_optimizer import Attached
from dpopt.compatibility.run_request import Request
from dpopt.compatibility.schedulers import Scheduler
from dpopt.compatibility.validators import ModuleValidator
from dpopt.estimators.plain import Plain
from dpopt.guards.open_runs import OpenRun, refuse_open
from dpopt.loader import private_loader
from dpopt.mechanisms import GaussianMechanism
from dpopt.sampling.registry import population, require_sized
from dpopt.training import PrivateTraining

if TYPE_CHECKING:
    from dpopt.audit import Canaries, Evidence


class PrivacyEngine:
    """Makes an ordinary PyTorch training loop private; keyword-compatible with Opacus 1.6.

    `accountant` is one of `accountants`' names (default: that of the ledger's last run, else "pld"). `ledger` is where charges are kept (default: a new file under
    `privacy-ledgers/`, printed); another configuration than its last run had is refused without
    `new_configuration`. `secure_mode` draws batches and noise exactly, from a cipher (`dpopt.release.randomness_tiers`).
    `sampler` is one of `dpopt.sampling.registry`: "balls-in-bins" and "shuffled" go through the records once an epoch, and
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
    Calling `backward()` on parts of a batch accumulates; `.grad` has nothing of it until `step()`, which takes a closure too.
    Where nobody was drawn, the loader hands out the first record, which adds exactly nothing. `detach()` ends the run
    and leaves no hook behind.
    """

    def __init__(
        self,
        *,
        accountant: str | None = None,
        secure_mode: bool = False,
        sampler: str = "poisson",
        relation: str = ADD_REMOVE,
        ledger: str | Path | None = None,
        new_configuration: bool = False,
        insecure_seed: int | None = None,
    ) -> None:
        accountant = accountant or accountant_of(ledger)
        refuse_gdp(accountant)
        find_accountant(accountant)
        check_relation(relation)
        require_sized(sampler)
        self._randomness = "secure" if secure_mode else "fast"
        self._sampler = sampler
        self._relation = relation
        self._new_configuration = new_configuration
        self._accountant = accountant
        self._ledger = SharedLedger(None if ledger is None else Path(ledger))
        self._insecure_seed = insecure_seed
        self._training: PrivateTraining | None = None
        self._runs: list[Attached] = []
        weakref.finalize(self, self._ledger.close)

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
        example_inputs: Tensor | tuple | Mapping[str, object] | None = None,
        target_unclipped_quantile: float | None = None,
        clipbound_learning_rate: float | None = None,
        max_clipbound: float | None = None,
        min_clipbound: float | None = None,
        unclipped_num_std: float | None = None,
        audit: Canaries | None = None,
    ) -> tuple[Any, ...]:
        """Return (module, optimizer, loader), the first two as given; in ghost mode (module, optimizer, criterion, loader).

        As in Opacus, the sampling rate is 1 / len(data_loader), and the noisy sum is divided by
        int(len(dataset) * rate) where `loss_reduction` is "mean", and not where it is "sum". Call it again for another
        model, or for another phase of the same one: all runs of an engine are charged on its one ledger.

        Args:
            module: the model; it is returned as it is, with hooks on it until `detach()`.
            optimizer: over parameters of the model. While the run is open it has what scripts for Opacus read,
                `noise_multiplier`, `max_grad_norm`, `expected_batch_size` (read only) and more: `dpopt.compatibility.private_optimizer`.
            criterion: asked whether it keeps examples apart and reduces as `loss_reduction` says; returned in ghost
                mode, as given.
            data_loader: over a dataset with a length; a private one, or a Poisson one of Opacus, is drawn from anew.
            noise_multiplier: noise standard deviation over sensitivity; 0 is not private.
            max_grad_norm: the clip norm; with "per_layer" also a list, one for each trainable parameter, as in Opacus.
            batch_first: False for inputs (T, B, ...).
            loss_reduction: what your loss is of the examples' losses, "mean" or "sum".
            poisson_sampling: True; another sampler is named, and priced, by the engine.
            clipping: one of `dpopt.estimators.ESTIMATORS`: a way to clip ("flat", "automatic", "per_layer", ...) or another
                estimator, with numbers where wanted: "quantile", "two_threshold:rest=4". "adaptive" is "quantile" with
                Opacus' keywords: `dpopt.compatibility.adaptive_clipping`. Its guarantee is printed.
            noise_generator: None; a seed would undo the noise.
            grad_sample_mode: "hooks", "functorch", "ew" or "ghost": one engine serves all.
            wrap_model: False returns a handle whose `cleanup()` ends the run in the module's place, as in Opacus.
            rand_on_empty: False; an empty batch is a step of noise alone.
            example_inputs: at least 2 examples, as the model takes them, to probe the model now; else its first batches.
            target_unclipped_quantile: with "adaptive", the fraction of norms to lie below the clip norm.
            clipbound_learning_rate: with "adaptive", how fast it moves there.
            max_clipbound: with "adaptive", what it stays below.
            min_clipbound: with "adaptive", what it stays above.
            unclipped_num_std: with "adaptive", the standard deviation of the noise in the count of norms below.
            audit: canaries, `dpopt.audit.Canaries(1000)`: `engine.evidence` is what the run leaked of them.

        Raises:
            ValueError: an argument that would weaken the guarantee, or that cannot be what was meant.
            MixesExamples: the model lets one example reach another.
        """
        self._check_switches(poisson_sampling, grad_sample_mode, rand_on_empty, noise_generator)
        adaptive = AdaptiveClipping(
            target_unclipped_quantile,
            clipbound_learning_rate,
            max_clipbound,
            min_clipbound,
            unclipped_num_std,
        )
        request = Request(
            module=module, optimizer=optimizer, criterion=criterion, loader=data_loader, max_grad_norm=max_grad_norm,
            clipping=clipping, adaptive=adaptive, batch_first=batch_first, loss_reduction=loss_reduction,
            mode=grad_sample_mode, wrap_model=wrap_model, sampler=self._sampler, example_inputs=example_inputs,
            audit=audit,
        )  # fmt: skip
        request.check()
        return self._made(request, noise_multiplier, None)

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        criterion: object = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: float,
        max_grad_norm: float | Sequence[float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        example_inputs: Tensor | tuple | Mapping[str, object] | None = None,
        target_unclipped_quantile: float | None = None,
        clipbound_learning_rate: float | None = None,
        max_clipbound: float | None = None,
        min_clipbound: float | None = None,
        unclipped_num_std: float | None = None,
        alphas: Sequence[float] | None = None,
        epsilon_tolerance: float | None = None,
        allow_large_delta: bool = False,
        audit: Canaries | None = None,
    ) -> tuple[Any, ...]:
        """`make_private` with the least noise that keeps `epochs` epochs within (target_epsilon, target_delta).

        The target is for everything on the ledger. A run that continues one keeps the noise of the last where as many
        epochs still fit. Steps beyond the target raise `BudgetExhausted`.

        Beside the arguments of `make_private`:

        - target_epsilon: the most that may be spent.
        - target_delta: its delta; above 1 / number of records only with `allow_large_delta`.
        - epochs: passes over the loader.
        - alphas: orders of Renyi divergences, for scripts that pass them; all orders are tried anyway.
        - epsilon_tolerance: how much of the target these epochs may leave (default: what 0.5 % of the noise is worth).
        - allow_large_delta: take a delta within which publishing a record counts as private.
        - audit: as in `make_private`.

        Raises:
            ValueError: as `make_private`, and for a target that needs no noise or that no noise meets.
        """
        self._check_switches(poisson_sampling, grad_sample_mode, rand_on_empty, noise_generator)
        check_orders(alphas)
        adaptive = AdaptiveClipping(
            target_unclipped_quantile,
            clipbound_learning_rate,
            max_clipbound,
            min_clipbound,
            unclipped_num_std,
        )
        request = Request(
            module=module, optimizer=optimizer, criterion=criterion, loader=data_loader, max_grad_norm=max_grad_norm,
            clipping=clipping, adaptive=adaptive, batch_first=batch_first, loss_reduction=loss_reduction,
            mode=grad_sample_mode, wrap_model=wrap_model, sampler=self._sampler, example_inputs=example_inputs,
            audit=audit,
        )  # fmt: skip
        request.check()
        budget = Budget(target_epsilon, target_delta, allow_large_delta)
        noise = request.calibrated(
            budget, epochs, epsilon_tolerance,
            rule=find_accountant(self._accountant, self._relation),
            standing=Standing.of(self._ledger),
            on_top=self._new_configuration or self._training is not None,
        )  # fmt: skip
        return self._made(request, noise, budget)

    @staticmethod
    def is_compatible(
        *, module: nn.Module, optimizer: Optimizer | None = None, data_loader: DataLoader[Any] | None = None
    ) -> bool:
        """Whether `make_private` would take these: see `validate`."""
        try:
            PrivacyEngine.validate(module=module, optimizer=optimizer, data_loader=data_loader)
        except ValueError:
            return False
        return True

    @staticmethod
    def validate(
        *, module: nn.Module, optimizer: Optimizer | None = None, data_loader: DataLoader[Any] | None = None
    ) -> None:
        """Refuse what `make_private` would refuse, as far as modules, parameters and sampler tell before any data.

        Raises:
            MixesExamples: modules that let one example reach another, such as BatchNorm; each is named with its remedy.
            ValueError: the optimizer has other parameters, or the loader cannot be drawn from by Poisson.
        """
        ModuleValidator.validate(module, strict=True)
        if optimizer is not None:
            check_optimizer(module, optimizer)
        if data_loader is not None:
            check_records(data_loader)

    @staticmethod
    def get_compatible_module(module: nn.Module) -> nn.Module:
        """A deep copy in which GroupNorm stands for BatchNorm, validated; make the optimizer from *its* parameters."""
        return ModuleValidator.fix_and_validate(module)

    def get_epsilon(self, delta: float) -> float:
        """Upper bound on epsilon of everything charged on this engine's ledger so far."""
        training = self.training
        if delta * population(training.sampling) > 1 + 1e-9:
            warnings.warn(
                f"delta {delta:g} is above 1 / number of records: within it, publishing one record as it is counts as "
                "private, so the epsilon beside it says little; a power of ten below is usual",
                stacklevel=2,
            )
        return training.epsilon(delta)

    @property
    def accountant(self) -> LedgerAccountant:
        """The ledger, as scripts written for Opacus ask it: `get_epsilon(delta=...)`, `history`."""
        return LedgerAccountant(self._accountant, lambda: self._training)

    @property
    def noise_multiplier(self) -> float:
        """Noise standard deviation over sensitivity, of the newest run."""
        mechanism = self.training.mechanism
        assert isinstance(mechanism, GaussianMechanism)
        return mechanism.noise_multiplier

    @property
    def training(self) -> PrivateTraining:
        """The run behind this engine, the newest of several."""
        if self._training is None:
            raise RuntimeError(
                "expected an engine in use; got one before make_private; call make_private first"
            )
        return self._training

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """What the newest run leaked of its canaries, where it was audited, once it has ended: `detach()` first."""
        return self.training.evidence

    def save_checkpoint(
        self,
        *,
        path: checkpoint.Place,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        noise_scheduler: Scheduler | None = None,
        grad_clip_scheduler: Scheduler | None = None,
        checkpoint_dict: Mapping[str, object] | None = None,
        module_state_dict_kwargs: Mapping[str, Any] | None = None,
        torch_save_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Save weights, optimizer, schedules and the estimator's public state; the ledger is named, not copied.

        Args:
            path: a file, written whole or not at all, or an object with `write`.
            module: whose `state_dict()` is saved.
            optimizer: whose `state_dict()` is saved.
            noise_scheduler: one of the schedulers in `dpopt`.
            grad_clip_scheduler: another.
            checkpoint_dict: more to save, of tensors, numbers, texts, lists and dicts; read without running code.
            module_state_dict_kwargs: arguments of `module.state_dict`.
            torch_save_kwargs: nothing may be in it.

        Raises:
            ValueError: something to save could only be read by running code.
            OSError: it could not be written.
        """
        checkpoint.save(
            self.training, path, module=module, optimizer=optimizer, accountant=self.accountant,
            schedulers={"noise_scheduler": noise_scheduler, "grad_clip_scheduler": grad_clip_scheduler},
            extra=checkpoint_dict, module_options=module_state_dict_kwargs, torch_options=torch_save_kwargs,
        )  # fmt: skip

    def load_checkpoint(
        self,
        *,
        path: checkpoint.Place,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        noise_scheduler: Scheduler | None = None,
        grad_clip_scheduler: Scheduler | None = None,
        module_load_dict_kwargs: Mapping[str, Any] | None = None,
        torch_load_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Go back to a checkpoint, after `make_private` on the ledger that paid for it. Nothing spent is given back.

        A checkpoint that Opacus wrote is taken too: its history is charged to this engine's ledger, once.

        Args:
            path: what `save_checkpoint` wrote.
            module: gets the weights.
            optimizer: gets its state.
            noise_scheduler: gets its state.
            grad_clip_scheduler: gets its state.
            module_load_dict_kwargs: arguments of `module.load_state_dict`.
            torch_load_kwargs: only `map_location`, which changes nothing.

        Returns:
            What the checkpoint holds, `checkpoint_dict` included.

        Raises:
            ValueError: another ledger, or an older state of it than the checkpoint's; or no checkpoint. Nothing is loaded.
            RuntimeError: before `make_private`.
        """
        return checkpoint.load(
            self.training, path, module=module, optimizer=optimizer,
            schedulers={"noise_scheduler": noise_scheduler, "grad_clip_scheduler": grad_clip_scheduler},
            module_options=module_load_dict_kwargs, torch_options=torch_load_kwargs,
        )  # fmt: skip

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

    def public_examples(self) -> AbstractContextManager[None]:
        """A block of ordinary steps on public examples, without a charge: see `PrivateTraining.public_examples`."""
        return self.training.public_examples()

    def detach(self) -> None:
        """End every run: remove the hooks and close the ledger. Models and optimizers are ordinary again."""
        for run in tuple(self._runs):
            run.cleanup()
        self._ledger.close()

    def __deepcopy__(self, memo: dict[int, object]) -> PrivacyEngine:
        """The engine itself, for copies of what holds it (a module with its engine, say): a run is not copied."""
        return self

    def __enter__(self) -> PrivacyEngine:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    def _check_switches(
        self, poisson: bool, mode: str, rand_on_empty: bool, generator: torch.Generator | None
    ) -> None:
        check_switches(poisson or self._sampler != "poisson", mode, rand_on_empty, generator)

    def _made(self, request: Request, noise_multiplier: float, budget: Budget | None) -> tuple[Any, ...]:
        mechanism, estimator = GaussianMechanism(noise_multiplier), request.estimator(noise_multiplier)
        self._end_those_of(request.module, request.optimizer)
        refuse_open(request.module)
        check_steps(request.optimizer)
        training = PrivateTraining(
            request.module,
            estimator=estimator,
            mechanism=mechanism,
            sampling=request.sampling,
            budget=budget,
            ledger=self._ledger,
            accountant_name=self._accountant,
            relation=self._relation,
            example_inputs=request.example_inputs,
            batch_dim=0 if request.batch_first else 1,
            mean_losses=request.loss_reduction == "mean",
            sum_gradients=request.loss_reduction == "sum",
            randomness=self._randomness,
            insecure_seed=self._insecure_seed,
            # A program that makes two runs of one engine has said what each of them is.
            new_configuration=self._new_configuration or self._training is not None,
            audit=request.audit,
        )
        try:
            training.__enter__()
        finally:
            if not training.is_open and not self._runs:
                self._ledger.close()
        self._training = training
        print(f"dpopt: {estimator.guarantee}", file=sys.stderr)
        run = self._attached(request, training)
        first = request.module if request.wrap_model else run
        private = private_loader(request.loader, training)
        if request.mode == "ghost":
            return first, run.optimizer, criterion_of(request.criterion, request.loss_reduction), private
        return first, run.optimizer, private

    def _attached(self, request: Request, training: PrivateTraining) -> Attached:
        module, optimizer = request.module, request.optimizer
        plain = isinstance(training.estimator, Plain)
        run = Attached(
            training, optimizer, max_grad_norm=request.max_grad_norm, loss_reduction=request.loss_reduction,
            clipped_at=request.clipped_at() if plain else None, ended=self._ended,
        )  # fmt: skip
        self._runs.append(run)
        step = OptimizerStep(training, holds=run.holds, release=run.release)
        run.hooks += [*step.attach(optimizer), ScalerMark.on(optimizer)]
        refusing = refusing_token_labels(module, training.sum.tape)
        run.hooks.append(module.register_forward_pre_hook(refusing, with_kwargs=True))
        run.hooks.append(module.register_forward_hook(training.sum.probing.probe_outputs))
        run.hooks.append(module.register_load_state_dict_pre_hook(accept_prefix))
        run.hooks.append(module.register_forward_pre_hook(OpenRun(module, partial(self._end, run))))
        run.attach()
        training.check_losses()
        return run

    def _end(self, run: Attached) -> None:
        run.cleanup()
        if run in self._runs:
            self._runs.remove(run)
        if not self._runs:
            self._ledger.close()

    def _end_those_of(self, module: nn.Module, optimizer: Optimizer) -> None:
        """A new phase of a model ends the one before; runs of other models go on."""
        mine = {id(parameter) for parameter in module.parameters()}
        for run in tuple(self._runs):
            shared = any(id(parameter) in mine for parameter in run.training.model.parameters())
            if shared or run.optimizer is optimizer:
                run.cleanup()

    def _ended(self, run: Attached) -> None:
        if run in self._runs:
            self._runs.remove(run)
        if not self._runs:
            self._ledger.close()
