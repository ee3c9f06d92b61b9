# SPDX-License-Identifier: Apache-2.0
"""Differentially private training for PyTorch: clipped, charged, noised, and only then written."""

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
from dpopt.budget import Budget
from dpopt.engine import PrivacyEngine
from dpopt.epochs import BallsInBins, CyclicSampling, ShuffledSampling
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
from dpopt.filtered import AdaptiveBudget
from dpopt.loader import BatchMemoryManager
from dpopt.losses import causal_lm_losses
from dpopt.mechanisms import GaussianMechanism, GroupGaussianMechanism
from dpopt.optimizers import AdamBC, Averaged, noise_std_of
from dpopt.sampling import Batch, FixedSizeSampling, PoissonSampling, TruncatedPoissonSampling, poisson
from dpopt.training import PrivateTraining
from dpopt.users import Users, UserSampling

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
    "Dice",
    "Difference",
    "FixedSizeSampling",
    "FlatClipper",
    "GaussianMechanism",
    "GroupClipper",
    "GroupGaussianMechanism",
    "MixesExamples",
    "PerSampleAdaptiveClipper",
    "PoissonSampling",
    "PrivacyEngine",
    "PrivateTraining",
    "Quantile",
    "Scheduled",
    "ShuffledSampling",
    "Slack",
    "TruncatedPoissonSampling",
    "TwoThreshold",
    "UnrecordedParameter",
    "UserSampling",
    "Users",
    "by_component",
    "causal_lm_losses",
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
