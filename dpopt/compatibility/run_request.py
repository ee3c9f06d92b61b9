# SPDX-License-Identifier: Apache-2.0
"""What a call of `make_private` asks for, and the estimator and the sampler that this describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from accountants import Accountant
from dpopt.budget.budget import Budget
from dpopt.budget.calibrated_noise import Standing, least_noise, whole_steps
from dpopt.compatibility.adaptive_clipping import NAME as ADAPTIVE
from dpopt.compatibility.adaptive_clipping import AdaptiveClipping
from dpopt.compatibility.opacus_arguments import check_reduction, estimator_of, one_norm
from dpopt.compatibility.optimizer_steps import check_optimizer
from dpopt.compatibility.poisson_loader import check_records
from dpopt.estimators.estimator import Estimator
from dpopt.estimators.registry import Run
from dpopt.public_numbers import check_real
from dpopt.sampling.poisson import PoissonSampling
from dpopt.sampling.registry import sized
from dpopt.sampling.sampler import Sampling

if TYPE_CHECKING:
    from dpopt.audit import Canaries


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """The arguments of one call; `sampler` is the engine's."""

    module: nn.Module
    optimizer: Optimizer
    criterion: object
    loader: DataLoader[Any]
    max_grad_norm: float | Sequence[float]
    clipping: str
    adaptive: AdaptiveClipping
    batch_first: bool
    loss_reduction: str
    mode: str
    wrap_model: bool
    sampler: str
    example_inputs: Tensor | tuple | Mapping[str, object] | None = None
    audit: Canaries | None = None

    def check(self) -> None:
        """Refuse what cannot be trained privately, or cannot be meant."""
        check_reduction(self.loss_reduction, self.criterion)
        check_records(self.loader)
        one_norm(self.max_grad_norm)
        self.adaptive.require(self.clipping)
        check_optimizer(self.module, self.optimizer)

    @property
    def num_records(self) -> int:
        """The length of the dataset, which counts as public."""
        return len(self.loader.dataset)  # pyright: ignore[reportArgumentType]

    @property
    def sampling(self) -> Sampling:
        """Poisson at the rate that the loader's length gives, as in Opacus, or the engine's sampler."""
        if self.sampler == "poisson":
            rate = 1 / len(self.loader)
            return PoissonSampling(rate, max(1, int(self.num_records * rate)))
        # A private loader has no batch size, but a length.
        batch_size = self.loader.batch_size or max(1, round(self.num_records / len(self.loader)))
        return sized(self.sampler, num_records=self.num_records, batch_size=batch_size)

    def estimator(self, noise_multiplier: float) -> Estimator:
        """The estimator of a run with this noise: only adaptive clipping, whose count shares it, depends on that."""
        norm = one_norm(self.max_grad_norm)
        if self.clipping == ADAPTIVE and norm is not None:
            return self.adaptive.estimator(norm, noise_multiplier)
        run = Run(self.module, 1.0 if norm is None else norm, self.num_records, self.sampling)
        return estimator_of(self.clipping, run, self.max_grad_norm)

    def clipped_at(self) -> Callable[[float], Estimator]:
        """From another clip norm to the estimator that has it."""
        return lambda norm: replace(self, max_grad_norm=norm).estimator(0.0)

    def calibrated(
        self,
        budget: Budget,
        epochs: float,
        tolerance: float | None,
        *,
        rule: Accountant,
        standing: Standing,
        on_top: bool,
    ) -> float:
        """The least noise multiplier of `epochs` epochs within `budget`."""
        check_real("epochs", epochs)
        sampling = self.sampling if self.audit is None else self.audit.widened(self.sampling)
        each = sampling.steps_per_charge if sampling.steps_per_charge > 1 else len(self.loader)
        # The price is that of the step as a whole, however the count of adaptive clipping shares it.
        priced = replace(self, adaptive=self.adaptive._replace(unclipped_num_std=None))
        return least_noise(
            budget,
            estimator=priced.estimator(0.0),
            sampling=sampling,
            steps=whole_steps(epochs, each),
            num_records=self.num_records,
            rule=rule,
            standing=standing,
            on_top=on_top,
            tolerance=tolerance,
        )
