# SPDX-License-Identifier: Apache-2.0
"""Differentially private training for PyTorch: clipped, charged, noised, and only then written."""

from accountants.calibrate import epsilon, noise_multiplier
from clipping import (
    FlatClipper,
    GroupClipper,
    MixesExamples,
    UnrecordedParameter,
    examine,
    per_layer,
    per_parameter,
    register_rule,
)
from dpopt.budget import Budget, BudgetExhausted
from dpopt.engine import PrivacyEngine
from dpopt.loader import BatchMemoryManager
from dpopt.losses import causal_lm_losses
from dpopt.mechanisms import GaussianMechanism
from dpopt.sampling import Batch, PoissonSampling, poisson
from dpopt.training import PrivateTraining

__all__ = [
    "Batch",
    "BatchMemoryManager",
    "Budget",
    "BudgetExhausted",
    "FlatClipper",
    "GaussianMechanism",
    "GroupClipper",
    "MixesExamples",
    "PoissonSampling",
    "PrivacyEngine",
    "PrivateTraining",
    "UnrecordedParameter",
    "causal_lm_losses",
    "epsilon",
    "examine",
    "noise_multiplier",
    "per_layer",
    "per_parameter",
    "poisson",
    "register_rule",
]
