# SPDX-License-Identifier: Apache-2.0
"""Differentially private training for PyTorch: clipped, charged, noised, and only then written."""

import dpopt.guards.own_packages  # noqa: F401 - asks first: what follows would fail obscurely

# isort: split
from accountants import BudgetExhausted
from accountants.calibrate import epsilon, noise_multiplier
from clipping import (
    AutomaticClipper,
    FlatClipper,
    GroupClipper,
    MixesExamples,
    PerSampleAdaptiveClipper,
    UnrecordedParameter,
    by_component,
    examine,
    per_adapter,
    per_block,
    per_layer,
    per_parameter,
    rule,
)
from dpopt.budget.budget import Budget
from dpopt.budget.filtered import AdaptiveBudget
from dpopt.compatibility.poisson_loader import DPDataLoader
from dpopt.compatibility.schedulers import (
    ExponentialGradClip,
    ExponentialNoise,
    LambdaGradClip,
    LambdaNoise,
    StepGradClip,
    StepNoise,
)
from dpopt.compatibility.validators import ModuleValidator
from dpopt.engine import PrivacyEngine
from dpopt.estimators import (
    Centred,
    Clip21,
    Dice,
    Difference,
    Quantile,
    Scheduled,
    Slack,
    TwoThreshold,
)
from dpopt.guards.open_runs import detach
from dpopt.loader import BatchMemoryManager
from dpopt.losses import causal_lm_losses
from dpopt.mechanisms import GaussianMechanism, GroupGaussianMechanism
from dpopt.optimizers import AdamBC, Averaged, noise_std_of
from dpopt.sampling.epochs import BallsInBins, CyclicSampling, ShuffledSampling
from dpopt.sampling.fixed_size import FixedSizeSampling
from dpopt.sampling.poisson import PoissonSampling, TruncatedPoissonSampling, poisson
from dpopt.sampling.sampler import Batch
from dpopt.sampling.users import Users, UserSampling
from dpopt.training import PrivateTraining

__all__ = [
    "AdamBC",
    "AdaptiveBudget",
    "AutomaticClipper",
    "Averaged",
    "BallsInBins",
    "Batch",
    "BatchMemoryManager",
    "Budget",
    "BudgetExhausted",
    "Centred",
    "Clip21",
    "CyclicSampling",
    "DPDataLoader",
    "Dice",
    "Difference",
    "ExponentialGradClip",
    "ExponentialNoise",
    "FixedSizeSampling",
    "FlatClipper",
    "GaussianMechanism",
    "GroupClipper",
    "GroupGaussianMechanism",
    "LambdaGradClip",
    "LambdaNoise",
    "MixesExamples",
    "ModuleValidator",
    "PerSampleAdaptiveClipper",
    "PoissonSampling",
    "PrivacyEngine",
    "PrivateTraining",
    "Quantile",
    "Scheduled",
    "ShuffledSampling",
    "Slack",
    "StepGradClip",
    "StepNoise",
    "TruncatedPoissonSampling",
    "TwoThreshold",
    "UnrecordedParameter",
    "UserSampling",
    "Users",
    "by_component",
    "causal_lm_losses",
    "detach",
    "epsilon",
    "examine",
    "noise_multiplier",
    "noise_std_of",
    "per_adapter",
    "per_block",
    "per_layer",
    "per_parameter",
    "poisson",
    "rule",
]
