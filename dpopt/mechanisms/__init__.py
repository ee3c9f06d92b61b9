# SPDX-License-Identifier: Apache-2.0
"""What adds the noise: everything before a mechanism is sensitive, everything after it is public."""

from dpopt.mechanisms.gaussian import GaussianMechanism, Mechanism, NoiseSource
from dpopt.mechanisms.grid_gaussian import GridGaussianMechanism, gridded, summation_rounding
from dpopt.mechanisms.group_gaussian import (
    Allocation,
    GroupGaussianMechanism,
    equal_budget,
    least_noise,
    uniform,
)
from dpopt.mechanisms.integer_sums import WholeSum, release_whole, whole_example

__all__ = [
    "Allocation",
    "GaussianMechanism",
    "GridGaussianMechanism",
    "GroupGaussianMechanism",
    "Mechanism",
    "NoiseSource",
    "WholeSum",
    "equal_budget",
    "gridded",
    "least_noise",
    "release_whole",
    "summation_rounding",
    "uniform",
    "whole_example",
]
